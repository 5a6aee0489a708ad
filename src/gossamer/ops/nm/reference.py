"""N:M storage in plain torch: the reference that every kernel is tested against.

A matrix (out, in) keeps `keep` places of every `group` consecutive columns, zeros where fewer
count; the last group may reach beyond the last column. `slots` is the largest power of two that
divides `keep`. 16 / slots groups make a span, stored as keep / slots blocks of 16 values: value
`keep = j * slots + i` of the span's group g is lane g * slots + i of its block j.

values (out, blocks * 16). codes uint8 (out, bytes): the place in its group of every value, in
log2(group) bits; lane by lane, 32 // bits blocks share a little-endian 32-bit word, later blocks
higher, and the last words of a row are 8 or 16 bits wide where that is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core.errors import FormatError, UsageError

LANES = 16
GROUPS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Layout:
    """The sizes that follow from the pattern and the number of columns."""

    keep: int
    group: int
    cols: int

    def __post_init__(self) -> None:
        if self.group not in GROUPS or not 0 < self.keep < self.group:
            raise UsageError(
                f"N:M kernels take 0 < N < M with M in {GROUPS}, not {self.keep}:{self.group}"
            )

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.group.bit_length() - 1

    @property
    def slots(self) -> int:
        """Values of a group that lie side by side in a block."""
        return min(LANES, self.keep & -self.keep)

    @property
    def spans(self) -> int:
        """Of a row."""
        return -(-self.cols // (LANES // self.slots * self.group))

    @property
    def padded(self) -> int:
        """Columns of whole spans."""
        return self.spans * (LANES // self.slots * self.group)

    @property
    def blocks(self) -> int:
        """Of 16 values, in a row."""
        return self.spans * (self.keep // self.slots)

    @property
    def per_word(self) -> int:
        """Blocks whose codes share a word."""
        return 32 // self.bits

    @property
    def tail(self) -> int:
        """Bytes of the last words, 0 where all are whole."""
        left = self.blocks % self.per_word
        return 0 if not left else next(w for w in (1, 2, 4) if 8 * w // self.bits >= left)

    @property
    def code_bytes(self) -> int:
        """Of a row."""
        return LANES * (self.blocks // self.per_word * 4 + self.tail)

    def nbytes(self, rows: int, width: int) -> int:
        """Of a matrix with values of `width` bytes."""
        return rows * (self.blocks * LANES * width + self.code_bytes)


def pack(matrix: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(values, codes) of a matrix (out, in), values in its dtype. O(out * in).

    Raises UsageError where a group has more non-zeros than the pattern keeps.
    """
    rows = matrix.shape[0]
    padded = functional.pad(matrix.detach(), (0, layout.padded - layout.cols))
    groups = padded.reshape(rows, layout.padded // layout.group, layout.group)
    full = groups != 0
    room = layout.keep - full.sum(-1, keepdim=True)
    if bool((room < 0).any()):
        raise UsageError(f"a group holds more than {layout.keep} of {layout.group} non-zeros")
    kept = full | (~full & ((~full).cumsum(-1) <= room))
    places = kept.nonzero()[:, -1].to(torch.uint8).reshape(*groups.shape[:2], layout.keep)
    values = groups[kept].reshape(places.shape)
    return _to_blocks(values, layout), _to_words(_to_blocks(places, layout), layout)


def unpack(values: Tensor, codes: Tensor, layout: Layout) -> Tensor:
    """The dense matrix (out, in) in the dtype of `values`. O(out * in)."""
    rows = values.shape[0]
    places = _from_blocks(from_words(codes, layout), layout)
    dense = torch.zeros(rows, places.shape[1], layout.group, dtype=values.dtype)
    dense.scatter_(-1, places.long(), _from_blocks(values, layout))
    return dense.reshape(rows, layout.padded)[:, : layout.cols].contiguous()


def columns(codes: Tensor, layout: Layout) -> Tensor:
    """int64 (out, blocks * 16): the column of every stored value, maybe beyond the last one."""
    spans = torch.arange(layout.spans).repeat_interleave(layout.keep // layout.slots)
    lanes = torch.arange(LANES) // layout.slots * layout.group
    base = spans.unsqueeze(1) * (layout.padded // max(1, layout.spans)) + lanes
    return from_words(codes, layout).long() + base.reshape(-1)


def check(values: Tensor, codes: Tensor, layout: Layout) -> None:
    """Raise FormatError where places in a group do not ascend or padding is not zero."""
    places = from_words(codes, layout)
    if not torch.equal(_to_words(places, layout), codes):
        raise FormatError("nm: an unused bit of the codes is set")
    ordered = _from_blocks(places, layout).int()
    if bool((ordered.diff(dim=-1) <= 0).any()):
        raise FormatError("nm: places in a group do not ascend")
    if bool((values[columns(codes, layout) >= layout.cols] != 0).any()):
        raise FormatError("nm: a value lies beyond the last column")


def linear(x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x (..., in) times the matrix transposed plus bias (out,); in float32, cast to x's dtype.

    Every stored value multiplies, zeros too.
    """
    inputs = functional.pad(x.float(), (0, layout.padded - layout.cols))
    at = columns(codes, layout)
    rows = [(inputs[..., at[r]] * values[r].float()).sum(-1) for r in range(values.shape[0])]
    result = torch.stack(rows, -1) if rows else x.new_zeros(*x.shape[:-1], 0, dtype=torch.float32)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def _to_blocks(stored: Tensor, layout: Layout) -> Tensor:
    """From (out, groups, keep) to (out, blocks * 16)."""
    rows, slots = stored.shape[0], layout.slots
    spans = stored.reshape(rows, layout.spans, LANES // slots, layout.keep // slots, slots)
    return spans.transpose(2, 3).reshape(rows, layout.blocks * LANES)


def _from_blocks(blocks: Tensor, layout: Layout) -> Tensor:
    rows, slots = blocks.shape[0], layout.slots
    spans = blocks.reshape(rows, layout.spans, layout.keep // slots, LANES // slots, slots)
    return spans.transpose(2, 3).reshape(rows, layout.padded // layout.group, layout.keep)


def _words(layout: Layout) -> list[tuple[int, int, int]]:
    """(first block, blocks, bytes of a lane) of every vector of words."""
    found = [
        (at, layout.per_word, 4)
        for at in range(0, layout.blocks // layout.per_word * layout.per_word, layout.per_word)
    ]
    if layout.tail:
        at = layout.blocks // layout.per_word * layout.per_word
        found.append((at, layout.blocks - at, layout.tail))
    return found


def _to_words(places: Tensor, layout: Layout) -> Tensor:
    """From uint8 (out, blocks * 16) to the packed codes."""
    rows = places.shape[0]
    blocks = places.reshape(rows, layout.blocks, LANES).long()
    parts = [torch.empty(rows, 0, dtype=torch.uint8)]
    for first, count, width in _words(layout):
        shifts = torch.arange(count).unsqueeze(1) * layout.bits
        words = (blocks[:, first : first + count] << shifts).sum(1)
        bytes_ = words.unsqueeze(-1) >> (8 * torch.arange(width)) & 255
        parts.append(bytes_.to(torch.uint8).flatten(1))
    return torch.cat(parts, 1)


def from_words(codes: Tensor, layout: Layout) -> Tensor:
    """The place of every value in its group, uint8 (out, blocks * 16)."""
    rows, start = codes.shape[0], 0
    parts = [torch.empty(rows, 0, dtype=torch.uint8)]
    for _, count, width in _words(layout):
        bytes_ = codes[:, start : start + LANES * width].reshape(rows, LANES, width).long()
        words = (bytes_ << (8 * torch.arange(width))).sum(-1)
        shifts = torch.arange(count).unsqueeze(1) * layout.bits
        places = words.unsqueeze(1) >> shifts & (layout.group - 1)
        parts.append(places.to(torch.uint8).flatten(1))
        start += LANES * width
    return torch.cat(parts, 1)
