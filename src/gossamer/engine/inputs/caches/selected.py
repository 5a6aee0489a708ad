"""Rows that are all kept, of which each token reads the pages that a method chooses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.core.budget import TopK
from gossamer.core.errors import FormatError
from gossamer.engine.inputs.caches.grown import Grown
from gossamer.engine.inputs.caches.paired import GrownPair
from gossamer.engine.inputs.caches.rows import Keeper, Prompt, Read, Rows, Shape, every_pair
from gossamer.engine.inputs.protocols import KeySelector
from gossamer.ops.attention import State, attention, decode
from gossamer.ops.select import keep


class SelectingKeeper(Keeper):
    """Makes rows that keep all, beside what the method notes of each page."""

    croppable = True

    def __init__(self, method: KeySelector, layer: int, layers: int) -> None:
        self.method, self.layer, self.layers = method, layer, layers

    def start(self, prompt: Prompt) -> Rows:
        """All of the first prompt."""
        return SelectedRows(self, prompt.key, prompt.value)

    def restore(self, tensors: Mapping[str, Tensor], texts: int, length: int) -> Rows:
        """The rows of a file; the method's notes are made anew."""
        key, value = tensors["key"], tensors["value"]
        if (
            key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]
            or key.shape[0] != texts or key.shape[2] != length
            or key.dtype != value.dtype or not key.is_floating_point()
        ):  # fmt: skip
            raise FormatError("a cache's keys and values do not fit each other: damaged file")
        return SelectedRows(self, key, value)

    def budget(self, length: int) -> int:
        """Keys that one token may read."""
        return self.method.keys_read(length, self.layer, self.layers)


class SelectedRows(Rows):
    """All keys and values, and the notes on each complete page."""

    def __init__(self, keeper: SelectingKeeper, key: Tensor, value: Tensor) -> None:
        self.keeper = keeper
        self._pair = GrownPair(key[:, :, :0], value[:, :, :0])
        self._summary: dict[str, Grown] = {}
        self._pages = 0
        self.append(key, value)

    @property
    def length(self) -> int:
        """Tokens of each text."""
        return self._pair.length

    @property
    def shape(self) -> Shape:
        """Of what it was given."""
        return Shape.of(self._pair.key, self._pair.value)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._pair.nbytes + sum(part.nbytes for part in self._summary.values())

    @property
    def rows(self) -> int:
        """Keys held."""
        return self._pair.key[..., 0].numel()

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens, and note each page that they complete."""
        self._pair.append(key, value)
        page = self.keeper.method.page
        complete = self._pair.length // page
        if complete == self._pages:
            return
        with torch.no_grad():
            pages = self._pair.key[:, :, self._pages * page : complete * page]
            notes = self.keeper.method.summarise(pages.unflatten(2, (-1, page)), self.keeper.layer)
        for name, note in notes.items():
            if name in self._summary:
                self._summary[name].append(note)
            else:
                self._summary[name] = Grown(note)
        self._pages = complete

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Read]:
        """Over the pages with the highest scores and the newest page."""
        page, length = self.keeper.method.page, self._pair.length
        index, choosing = self.chosen(query)
        output, _ = decode(query, self._pair.key, self._pair.value, index, page=page, scale=scale)
        short = -length % page  # the newest page is always read, and may be ragged
        keys = index.shape[0] * index.shape[1] * (index.shape[2] * page - short)
        width = (self._pair.key.shape[-1] + self._pair.value.shape[-1]) * query.element_size()
        return output, Read(keys, keys * width, choosing)

    def chosen(self, query: Tensor) -> tuple[Tensor, int]:
        """int64 (texts, kv_heads, count): pages to read, and the bytes read to choose them."""
        page, length = self.keeper.method.page, self._pair.length
        heads = self._pair.key.shape[:2]
        rest = length - self._pages * page
        count = (min(self.keeper.budget(length), length) - rest) // page
        if count >= self._pages:
            every = torch.arange(-(-length // page), device=query.device)
            return every.expand(*heads, -1), 0
        newest = torch.full((*heads, 1), self._pages, device=query.device)
        if count <= 0:  # then there is a newest page that is not complete
            return newest, 0
        notes = {name: part.used for name, part in self._summary.items()}
        with torch.no_grad():
            scores = self.keeper.method.score(query, notes, self.keeper.layer)
        always = None
        if not rest:
            always = torch.arange(self._pages, device=query.device) == self._pages - 1
        kept = keep(scores, TopK(count), always)
        index = kept.nonzero()[:, -1].reshape(*heads, count)
        index = torch.cat([index, newest], dim=-1) if rest else index
        return index, sum(part.nbytes for part in notes.values())

    def past(self, query: Tensor, scale: float) -> State:
        """Over all rows."""
        key, value = self._pair.key, self._pair.value
        layout = every_pair(query, key.shape[2])
        found: State = attention(query, key, value, layout, scale=scale)
        return found

    def settle(self, query: Tensor, scale: float) -> None:
        """Nothing: tokens were noted as they came."""

    def taken(self, texts: Tensor) -> Rows:
        """A copy that holds these texts."""
        key, value = (x.index_select(0, texts) for x in (self._pair.key, self._pair.value))
        return SelectedRows(self.keeper, key, value)

    def check_crop(self, tokens: int) -> None:
        """Any number of tokens can be taken back."""

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens, and what was noted of pages that are no longer complete."""
        length = self._pair.length - tokens
        self._pair.crop(length)
        self._pages = length // self.keeper.method.page
        for part in self._summary.values():
            part.crop(self._pages)

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values."""
        return {"key": self._pair.key.contiguous(), "value": self._pair.value.contiguous()}

    def whole(self) -> tuple[Tensor, Tensor]:
        """Every key and value."""
        return self._pair.key, self._pair.value
