"""One layer of a cache: prompts as they come, then rows that a method keeps.

Three numbers are kept apart. `seen` counts tokens of the batch with its padding, from which the
model takes positions and the size of its masks. A text's own tokens count without padding. The rows
that are stored are what the method left of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from gossamer.core.errors import UsageError
from gossamer.engine.inputs.caches.grown import Grown
from gossamer.engine.inputs.caches.rows import Keeper, Prompt, Read, Rows, Shape, causal_state
from gossamer.ops.attention import merge


@dataclass(frozen=True, eq=False)
class Arrival:
    """One call of a layer's attention.

    Attributes
    ----------
    query : Tensor
        (batch, heads, new, width).
    key, value : Tensor
        (batch, kv_heads, new, width).
    real : Tensor or None
        bool (batch, new): tokens that are no padding; None where all are real.
    scale : float
        Factor of the products.
    dense : function of key and value
        The model's own attention over them, (batch, new, heads, width).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None
    scale: float
    dense: Callable[[Tensor, Tensor], Tensor]


class _OpenPrompt:
    """A prompt that has not ended: every key and value, in the batch's own shape."""

    def __init__(self, first: Arrival) -> None:
        self.key, self.value = Grown(first.key), Grown(first.value)
        self.real = _real_of(first)

    def append(self, more: Arrival) -> None:
        self.key.append(more.key)
        self.value.append(more.value)
        self.real = torch.cat([self.real, _real_of(more)], dim=1)

    def taken(self, texts: Tensor) -> None:
        self.key, self.value = self.key.taken(texts), self.value.taken(texts)
        self.real = self.real.index_select(0, texts.to(self.real.device))


class SparseLayer(CacheLayerMixin):
    """A layer of `SparseCache`."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, keeper: Keeper) -> None:
        super().__init__()
        self.keeper = keeper
        self.reset()

    def reset(self) -> None:
        """Forget everything, the tally of what was read included."""
        self.seen = self.tokens = 0
        self.read = self.possible = Read()
        self.scale = 1.0
        self.texts = self.solid = 0
        self.shape: Shape | None = None
        self._open: _OpenPrompt | None = None
        self._rows: list[Rows] = []
        """One for the batch, or one for each text."""
        self._recent: list[Tensor] = []
        """By text, the last queries of a prompt that has not been settled."""

    @property
    def is_croppable(self) -> bool:
        """Whether any number of tokens can be taken back."""
        return self.keeper.croppable

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made before the first token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the model is given in place of keys and values; the cache takes them in `attend`.

        Once rows were given up there is nothing that ordinary attention may read, so it gets
        tensors without memory, which any other attention refuses.
        """
        if not self._rows:
            return key_states, value_states
        return key_states.to("meta"), value_states.to("meta")

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: the next token's place."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are over all tokens seen; the layer takes from them which new ones are real."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def attend(self, call: Arrival) -> Tensor:
        """Take new tokens in: their output (batch, new, heads, value width)."""
        new = call.query.shape[2]
        self._check(call)
        self.texts, self.scale, self.is_initialized = call.query.shape[0], call.scale, True
        if new == 1:
            self.end_prompt(call)
            output = self._one(call)
            self.tokens += 1
        else:
            output = self._first(call) if not self._rows else self._later(call)
            self._remember(call)
        self.seen += new
        self.solid = _trailing(call, self.solid)
        return output

    def end_prompt(self, like: Arrival | None = None) -> None:
        """Hand an open prompt over to the method; `like` tells shapes where there was none."""
        if self._open is not None or not self._rows:
            if self._open is None and like is None:
                return
            self._start(like)
        elif self._recent:
            self._split(len(self._rows) > 1 or _unequal(self._recent))
            for rows, query in zip(self._rows, self._grouped(self._recent), strict=True):
                rows.settle(query, self.scale)
        self._recent = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(rows.nbytes for rows in self._rows)
        held += sum(x.untyped_storage().nbytes() for x in self._recent)
        if self._open is not None:
            held += self._open.key.nbytes + self._open.value.nbytes
        return held

    @property
    def rows(self) -> int:
        """Keys held, summed over texts and heads of keys."""
        if self._open is not None:
            return self._open.key.length * self._open.key.used.shape[1] * self.texts
        return sum(rows.rows for rows in self._rows)

    @property
    def heads(self) -> int:
        """Lists of keys: heads of keys times texts."""
        return self.texts * (0 if self.shape is None else self.shape.kv_heads)

    @property
    def dense_bytes(self) -> int:
        """What a dense cache would hold."""
        return self.texts * self.seen * (0 if self.shape is None else self.shape.nbytes)

    @property
    def stored(self) -> list[Rows]:
        """What is held of prompts that are over: of the batch, or of each text."""
        return self._rows

    def restored(self, rows: list[Rows], seen: int, solid: int, texts: int) -> None:
        """Take what was read from a file."""
        self.reset()
        self.shape = rows[0].shape
        self._rows, self.texts, self.is_initialized = rows, texts, True
        self.seen, self.solid = seen, solid

    def start_from(self, other: SparseLayer) -> None:
        """Take a copy of a prompt that is open in another layer, of any method."""
        if other.stored or other.keeper.last < self.keeper.last:
            raise UsageError(
                "a cache starts from one whose prompt is not over, and which remembers as many of "
                f"its last queries: {self.keeper.last}, not {other.keeper.last}"
            )
        self.reset()
        keeper, held = self.keeper, copy.deepcopy(vars(other))
        self.__dict__.update(held | {"keeper": keeper})
        self._recent = [q[:, :, max(0, q.shape[2] - keeper.last) :].clone() for q in self._recent]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The texts in another order, which may repeat some and leave out others."""
        if not self.seen:
            return
        texts = beam_idx.reshape(-1)
        if self._open is not None:
            self._open.taken(texts)
        if len(self._rows) == 1 and self.texts > 1:
            self._rows = [self._rows[0].taken(texts)]
        elif self._rows:
            first = torch.zeros(1, dtype=torch.int64, device=texts.device)
            self._rows = [self._rows[i].taken(first) for i in texts.tolist()]
        if self._recent:
            self._recent = [self._recent[i].clone() for i in texts.tolist()]
        self.texts = texts.numel()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each text so many times."""
        self.reorder_cache(torch.arange(self.texts).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these texts; indices, or a bool mask."""
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.reorder_cache(chosen)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, given as a number below 0; 0 changes nothing."""
        count = -int(tokens_to_remove)
        self.check_crop(count)
        if not count:
            return
        if self._open is not None:
            length = self.seen - count
            self._open.key.crop(length)
            self._open.value.crop(length)
            self._open.real = self._open.real[:, :length].clone()
        for rows in self._rows:
            rows.crop(count)
        self.seen -= count
        self.solid = max(0, self.solid - count)

    def check_crop(self, count: int) -> None:
        """Raise UsageError unless so many tokens can be taken back, of every text alike."""
        if count < 0:
            raise UsageError(
                f"crop takes the number of tokens to remove as a negative one, not {-count}"
            )
        if count > self.seen:
            raise UsageError(f"crop of {count} tokens from a cache of {self.seen}")
        if count and self.keeper.last and (self._open is not None or self._recent):
            raise UsageError(
                "tokens of a prompt cannot be taken back from a cache that evicts: it has "
                "forgotten earlier queries; reset it and give the shorter prompt"
            )
        if count > self.solid and self._rows:
            raise UsageError(
                f"{count} tokens cannot be taken back: only the last {self.solid} are real tokens "
                "of every text, the others hold padding"
            )
        for rows in self._rows:
            rows.check_crop(count)

    def _first(self, call: Arrival) -> Tensor:
        """Part of the first prompt: the model's own attention over all of it so far."""
        if self._open is None:
            self._open = _OpenPrompt(call)
        else:
            self._open.append(call)
        return call.dense(self._open.key.used, self._open.value.used)

    def _later(self, call: Arrival) -> Tensor:
        """Part of a further prompt: over all rows, and causally over itself."""
        self._split(call.real is not None and not bool(call.real.all()))
        rows = self._rows[0]
        if len(self._rows) == 1 and rows.whole() is not None:
            rows.append(call.key, call.value)
            key, value = rows.whole() or (call.key, call.value)
            return call.dense(key, value)
        output = call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
        for text, rows, real in self._parts(call):
            query, key, value = (x[text][:, :, real] for x in (call.query, call.key, call.value))
            if query.shape[2]:
                own = causal_state(query, key, value, call.scale)
                output[text, :, real] = merge(own, rows.past(query, call.scale))[0]
                rows.append(key, value)
        return output.transpose(1, 2)

    def _one(self, call: Arrival) -> Tensor:
        """One token of each text."""
        self._split(call.real is not None and not bool(call.real.all()))
        if len(self._rows) == 1:
            return self._decoded(self._rows[0], call.query, call.key, call.value, call.scale)
        shape = (call.query.shape[0], 1, call.query.shape[1], call.value.shape[-1])
        output = call.query.new_zeros(shape)
        for text, rows, real in self._parts(call):
            query, key, value = (x[text][:, :, real] for x in (call.query, call.key, call.value))
            if query.shape[2]:
                output[text] = self._decoded(rows, query, key, value, call.scale)
        return output

    def _decoded(
        self, rows: Rows, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        rows.append(key, value)
        output, read = rows.attend(query, scale)
        self.read += read
        tokens, shape = key.shape[0] * rows.length, Shape.of(key, value)
        self.possible += Read(tokens * shape.kv_heads, tokens * shape.nbytes)
        return output.transpose(1, 2)

    def _check(self, call: Arrival) -> None:
        """Raise UsageError unless these tokens go on from those before."""
        found = Shape.of(call.key, call.value)
        if self.shape is not None and self.seen:
            if found != self.shape:
                raise UsageError(f"a cache of {self.shape} was given {found}: of another model?")
            if call.query.shape[0] != self.texts:
                raise UsageError(
                    f"a cache of {self.texts} texts was given {call.query.shape[0]}; repeat its "
                    "texts with batch_repeat_interleave, or reset it"
                )
        self.shape = found

    def _parts(self, call: Arrival) -> list[tuple[slice, Rows, Tensor | slice]]:
        """Each text, or all of them, with its rows and its real new tokens."""
        if len(self._rows) == 1:
            return [(slice(None), self._rows[0], slice(None))]
        real = _real_of(call)
        return [(slice(i, i + 1), rows, real[i]) for i, rows in enumerate(self._rows)]

    def _split(self, wanted: bool) -> None:
        """From rows of the batch to rows of each text."""
        if wanted and len(self._rows) == 1 and self.texts > 1:
            whole = self._rows[0]
            each = torch.arange(self.texts)
            self._rows = [whole.taken(each[i : i + 1]) for i in range(self.texts)]

    def _remember(self, call: Arrival) -> None:
        """The last queries of each text's prompt, as copies."""
        last = self.keeper.last
        before = self._recent or [call.query[:1, :, :0]] * self.texts
        real = _real_of(call)
        self._recent = []
        for text, old in enumerate(before):
            own = call.query[text : text + 1][:, :, real[text]]
            both = torch.cat([old, own], dim=2)
            self._recent.append(both[:, :, max(0, both.shape[2] - last) :].clone())

    def _start(self, like: Arrival | None) -> None:
        """Make rows of the first prompt, which may have no token."""
        prompt = self._open
        if prompt is None and like is not None:
            nothing = (like.query[:, :, :0], like.key[:, :, :0], like.value[:, :, :0])
            self._rows = [self.keeper.start(Prompt(*nothing, self.scale))]
        elif prompt is not None:
            key, value = prompt.key.used, prompt.value.used
            if bool(prompt.real.all()):
                query = torch.cat(self._recent)
                self._rows = [self.keeper.start(Prompt(query, key, value, self.scale))]
            else:
                self._rows = [
                    self.keeper.start(
                        Prompt(
                            self._recent[i], key[i : i + 1][:, :, real],
                            value[i : i + 1][:, :, real], self.scale,
                        )
                    )
                    for i, real in enumerate(prompt.real)
                ]  # fmt: skip
        self._open = None

    def _grouped(self, queries: list[Tensor]) -> list[Tensor]:
        return [torch.cat(queries)] if len(self._rows) == 1 else queries


def _trailing(call: Arrival, before: int) -> int:
    """How many of the newest tokens are real ones of every text, `before` those of this call."""
    new = call.query.shape[2]
    if call.real is None:
        return before + new
    padded = (~call.real.all(0)).nonzero()
    return new - 1 - int(padded[-1]) if padded.numel() else before + new


def _unequal(queries: list[Tensor]) -> bool:
    return len({query.shape[2] for query in queries}) > 1


def _real_of(call: Arrival) -> Tensor:
    """bool (batch, new)."""
    if call.real is not None:
        return call.real
    shape = (call.query.shape[0], call.query.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=call.query.device)
