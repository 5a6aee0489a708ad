"""Greedy generation by a sparse model that its own dense weights check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import unwrap
from gossamer.engine.data import Batch
from gossamer.engine.hooks import evaluating
from gossamer.engine.inputs.activations.result import ActivationResult
from gossamer.engine.inputs.activations.run import sparsify_activations


@dataclass(frozen=True)
class CorrectedResult:
    """A text that a sparse model wrote and its dense weights checked.

    Attributes
    ----------
    ids : Tensor
        int64 (1, tokens + new).
    checks : int
        Dense passes behind the prompt's.
    advance : float
        Tokens gained by a check, on average; up to the period.
    taken_back : int
        Tokens that the sparse model wrote in vain.
    effective_density : float
        Weights read for a token of the text over those that dense decoding reads: the sparse steps,
        those in vain too, and the checks, of the layers that the method serves.
    sparse : ActivationResult
        What the sparse steps did.
    """

    ids: Tensor
    checks: int
    advance: float
    taken_back: int
    effective_density: float
    sparse: ActivationResult


def generate_corrected(
    model: nn.Module,
    method: Any,
    ids: Tensor,
    max_new_tokens: int,
    data: Iterable[Batch] | None = None,
    *,
    eos: Sequence[int] = (),
    **options: Any,
) -> CorrectedResult:
    """See `gossamer.generate_corrected`, which also takes a method by its name."""
    model = unwrap(model)
    _check(model, method, ids, max_new_tokens)
    with (
        evaluating(model),
        sparsify_activations(model, method.start, data, loss=False, **options) as run,
    ):
        writer = _Writer(model, run.dense, method)
        writer.read_prompt(ids)
        while len(writer.text) < max_new_tokens and not set(eos) & set(writer.text):
            writer.round(max_new_tokens - len(writer.text))
        told = run.result
    text = writer.text[:max_new_tokens]
    ends = [place for place, token in enumerate(text) if token in eos]
    text = text[: ends[0] + 1] if ends else text
    gained = max(1, writer.gained)
    density = 1.0 if told.density is None else told.density
    return CorrectedResult(
        torch.cat([ids, torch.tensor([text], device=ids.device)], dim=1), writer.checks,
        writer.gained / max(1, writer.checks), writer.taken_back,
        (writer.steps * density + writer.checks) / gained, told,
    )  # fmt: skip


def _check(model: nn.Module, method: Any, ids: Tensor, count: int) -> None:
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise UsageError(f"ids is one prompt of two tokens or more, not {tuple(ids.shape)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"max_new_tokens is at least 1, not {count!r}")
    if not all(hasattr(method, name) for name in ("start", "period", "accept", "temperature")):
        raise UsageError(
            f"{type(method).__name__} corrects nothing: give gs.activations.Sirius(start=...)"
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + count + method.period > limit:
        raise UsageError(
            f"{ids.shape[1]} prompt tokens, {count} new ones and a period of {method.period} exceed "
            f"the model's {limit} positions"
        )


class _Writer:
    """The text, its last token, and a cache of all tokens but that one, computed densely."""

    def __init__(
        self, model: Any, dense: Callable[[], AbstractContextManager[None]], method: Any
    ) -> None:
        self.model, self.dense, self.method = model, dense, method
        self.text: list[int] = []
        self.cache: Any = None
        self.checks = self.gained = self.taken_back = self.steps = 0

    def read_prompt(self, ids: Tensor) -> None:
        """Densely; methods that choose neurons do so here. The first token is the dense one."""
        self.device = ids.device
        output = self.model(input_ids=ids, use_cache=True)
        self.cache = output.past_key_values
        if not hasattr(self.cache, "crop"):
            raise UsageError(f"{type(self.model).__name__} has a cache that cannot be rolled back")
        self.text.append(int(output.logits[0, -1].argmax()))

    def round(self, most: int) -> None:
        """The sparse model writes, the dense one checks and takes back what it finds unlikely."""
        last = self.text[-1]
        written = self._write(last, min(self.method.period, most))
        self._roll_back(len(written))
        with self.dense():
            logits = self._call([last, *written[:-1]])
        accepted = self._accepted(logits, written)
        self.checks += 1
        self.steps += len(written)
        new = written[:accepted]
        if accepted < len(written):
            new.append(int(logits[accepted].argmax()))
            self._roll_back(len(written) - accepted - 1)
        self.taken_back += len(written) - accepted
        self.gained += len(new)
        self.text += new

    def _roll_back(self, count: int) -> None:
        if count:
            self.cache.crop(-count)

    def _write(self, token: int, count: int) -> list[int]:
        written: list[int] = []
        for _ in range(count):
            token = int(self._call([token])[-1].argmax())
            written.append(token)
        return written

    def _call(self, tokens: list[int]) -> Tensor:
        """The logits (tokens, vocabulary) behind each; the cache grows by them."""
        ids = torch.tensor([tokens], device=self.device)
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        found: Tensor = output.logits[0]
        return found

    def _accepted(self, logits: Tensor, written: list[int]) -> int:
        """How many tokens from the first on the dense model finds likely."""
        wanted = torch.tensor(written, device=logits.device)
        if self.method.accept >= 1:
            good = logits.argmax(dim=-1) == wanted
        else:
            shares = torch.softmax(logits.float() / self.method.temperature, dim=-1)
            good = shares.gather(1, wanted.unsqueeze(1)).squeeze(1) >= self.method.accept
        return int(good.long().cumprod(0).sum())
