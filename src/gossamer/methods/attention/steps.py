"""What methods for diffusion models share: dense calls, masses of tiles, budgets and counts."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import Attended, DenoisingStep, TokenGrid
from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import products
from gossamer.ops.attention import Layout, State, attention, bits

_CHUNK = 256


def grid_of(method: str, call: AttentionCall, step: DenoisingStep) -> TokenGrid:
    """The grid of a step; raises UsageError where it was not given or does not fit the call."""
    if step.grid is None:
        raise UsageError(
            f"{method} goes by frames: say how tokens lie, gs.sparse_denoising(..., "
            "grid=gs.TokenGrid(frames, height, width, text=...))"
        )
    if step.grid.tokens != call.queries:
        raise UsageError(
            f"{method}: a grid of {step.grid.tokens} tokens, but layer {call.layer} has "
            f"{call.queries}"
        )
    return step.grid


def run(call: AttentionCall, layout: Layout) -> State:
    """(output, log-sum-exp) over a layout's pairs."""
    return attention(call.query, call.key, call.value, layout, scale=call.scale)


def dense(call: AttentionCall) -> State:
    """The same over all pairs."""
    return run(call, everything(call.queries, call.keys, call.query.device))


def everything(queries: int, keys: int, device: torch.device, block: int = 64) -> Layout:
    """All pairs, one list for all heads."""
    shape = (-(-queries // block), -(-keys // block))
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Layout.from_blocks(mask, queries, keys, block, block)


def answer_dense(call: AttentionCall, state: object = None) -> Attended:
    """All pairs, and a state that goes on."""
    return Attended(dense(call)[0], all_pairs(call), state, "dense")


def all_pairs(call: AttentionCall) -> int:
    """How many pairs all batches and heads have."""
    return call.query.shape[0] * call.query.shape[1] * call.queries * call.keys


def count_pairs(layout: Layout, lists: int) -> int:
    """Pairs that a layout of tiles computes for `lists` batches times heads."""
    row = torch.repeat_interleave(layout.offsets.diff(dim=-1).flatten())
    row = row % max(1, layout.query_blocks)
    height = (layout.queries - row * layout.rows).clamp(max=layout.rows)
    width = (layout.keys - layout.blocks.long() * layout.columns).clamp(max=layout.columns)
    found = height * width
    if layout.tiles is not None and layout.masks is not None and layout.masks.shape[0]:
        counts = [bits.unpack(x, layout.columns).sum((1, 2)) for x in layout.masks.split(1024)]
        partial = layout.tiles >= 0
        found[partial] = torch.cat(counts)[layout.tiles[partial].long()]
    own = layout.offsets.shape[0] * layout.offsets.shape[1]
    return int(found.sum()) * (lists // own)


def lists_of(call: AttentionCall) -> int:
    """Batches times heads."""
    return call.query.shape[0] * call.query.shape[1]


def tile_mass(call: AttentionCall, lse: Tensor, rows: int, columns: int) -> Tensor:
    """The attention in each tile, summed: of exp(logit - lse), float32 (batch, heads, query blocks,
    key blocks).

    Exact where lse is the log-sum-exp of all keys; a few hundred queries at a time.
    """
    key, found = call.key.float(), []
    chunk = max(1, _CHUNK // rows) * rows
    for first in range(0, call.queries, chunk):
        part = slice(first, min(first + chunk, call.queries))
        logits = products(call.query[:, :, part].float() * call.scale, key)
        weights = logits.sub_(lse[:, :, part].unsqueeze(-1)).exp_()
        weights = torch.nn.functional.pad(weights, (0, -call.keys % columns))
        weights = weights.unflatten(-1, (-1, columns)).sum(-1)
        weights = torch.nn.functional.pad(weights, (0, 0, 0, -weights.shape[2] % rows))
        found.append(weights.unflatten(2, (-1, rows)).sum(3))
    return torch.cat(found, dim=2)


def sampled_mass(call: AttentionCall, rows: int, columns: int, every: int) -> Tensor:
    """An estimate of the largest attention in each tile, from every so-manieth token.

    Softmax over the sampled keys, then the maximum over the samples of a tile; float32 (batch,
    heads, query blocks, key blocks). Both block sizes are multiples of `every`.
    """
    key, found = call.key[:, :, ::every].float(), []
    height, width = rows // every, columns // every
    query = call.query[:, :, ::every].float() * call.scale
    for part in query.split(max(1, _CHUNK // height) * height, dim=2):
        weights = products(part, key).softmax(-1)
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[3] % width))
        weights = weights.unflatten(-1, (-1, width)).amax(-1)
        weights = torch.nn.functional.pad(weights, (0, 0, 0, -weights.shape[2] % height))
        found.append(weights.unflatten(2, (-1, height)).amax(3))
    return torch.cat(found, dim=2)


def blocks_with(at: slice, length: int, block: int, device: torch.device) -> Tensor:
    """bool (blocks,): those with a token of a slice."""
    token = torch.zeros(-(-length // block) * block, dtype=torch.bool, device=device)
    token[at] = True
    return token.unflatten(0, (-1, block)).any(1)


def sizes(length: int, block: int, device: torch.device) -> Tensor:
    """int64 (blocks,): tokens of each block."""
    first = torch.arange(0, length, block, device=device)
    return (length - first).clamp(max=block)


def blocks_per_row(density: float, queries: Tensor, keys: Tensor, text: Tensor) -> int:
    """The most key blocks for each block of queries that keep within a share of all pairs.

    queries, keys: tokens of each block. text: bool (query blocks,), rows that take all blocks,
    which counts. At least one.
    """
    total = int(queries.sum()) * int(keys.sum())
    left = density * total - int(queries[text].sum()) * int(keys.sum())
    cost = keys.sort(descending=True).values.cumsum(0) * int(queries[~text].sum())
    return max(1, int((cost <= left + 1e-9 * total).sum()))


def check_number(method: str, name: str, value: object, low: float, high: float) -> None:
    """Raise UsageError unless it is a number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise UsageError(f"{method}: {name} is a number from {low:g} to {high:g}, not {value!r}")
