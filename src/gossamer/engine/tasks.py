"""What comparisons measure: a language model's text, an encoder's lines, or any model's batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult
from gossamer.engine.data import Batch
from gossamer.engine.evaluate import (
    Speed,
    bits_per_byte,
    decode_speed,
    embedding_similarity,
    encode_speed,
)

PROMPT = 32
"""Tokens before the timed ones."""
_HELD_OUT_LINES = 256


@dataclass(frozen=True)
class Subject:
    """A model with what turns text into its tokens; tokenizer is None for bytes."""

    model: nn.Module
    tokenizer: Any
    causal: bool = True

    @property
    def encode(self) -> Callable[[bytes], Sequence[int]] | None:
        """From bytes to token ids, or None where a byte is a token."""
        if self.tokenizer is None:
            return None
        return lambda data: self.tokenizer(data.decode("utf-8", "replace"))["input_ids"]

    def ids(self, data: bytes) -> Tensor:
        """int64 (tokens,)."""
        return torch.tensor(list(data if self.encode is None else self.encode(data)))


@dataclass(frozen=True)
class Language:
    """A causal language model: bits per byte of held-out text, greedy decoding."""

    subject: Subject
    text: bytes
    metric = "bits per byte"
    better = "lower"

    def check(self, length: int, tokens: int) -> None:
        """Raises UsageError where windows or decoding would leave the model's positions."""
        config: Any = getattr(self.subject.model, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:
            return
        if length > limit:
            raise UsageError(f"a length of {length} exceeds the model's {limit} positions")
        if PROMPT + tokens > limit:
            raise UsageError(
                f"{tokens} tokens after a prompt of {PROMPT} exceed the model's {limit} "
                f"positions; give at most {limit - PROMPT}"
            )

    def calibration(self, data: bytes, n: int, length: int, seed: int) -> list[dict[str, Tensor]]:
        """Random windows of tokens."""
        return _windows(self.subject, data, n, length, seed)

    def quality(self, dense: nn.Module, model: nn.Module) -> float:
        """Of `model`; float32 arithmetic."""
        return bits_per_byte(model, self.text, encode=self.subject.encode)

    def speed(self, dense: nn.Module, sparse: nn.Module | CompressResult, tokens: int) -> Speed:
        """Decoding `tokens` tokens after a prompt from the held-out text."""
        prompt = self.subject.ids(self.text[:4096])[:PROMPT].unsqueeze(0)
        return decode_speed(dense, sparse, prompt, tokens)


@dataclass(frozen=True)
class Encoder:
    """A text encoder: cosine similarity of embeddings of held-out lines, inputs per second."""

    subject: Subject
    text: bytes
    metric = "mean cosine similarity to the dense embeddings"
    better = "higher"

    def check(self, length: int, tokens: int) -> None:
        """Lines are cut to the model's positions, so any length will do."""

    def calibration(self, data: bytes, n: int, length: int, seed: int) -> list[dict[str, Tensor]]:
        """`n` random lines, cut to `length` tokens, in padded batches of 8."""
        lines = _lines(data)
        if not lines:
            raise UsageError("--data holds no line of text to calibrate with")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(lines), generator=generator)[:n].tolist()
        return self._batches([lines[index] for index in order], 8, length)

    def quality(self, dense: nn.Module, model: nn.Module) -> float:
        """Of `model`; float32 arithmetic."""
        return 1.0 if model is dense else embedding_similarity(dense, model, self._held_out())

    def speed(self, dense: nn.Module, sparse: nn.Module | CompressResult, tokens: int) -> Speed:
        """Encoding the held-out lines in batches of 16."""
        return encode_speed(dense, sparse, self._held_out())

    def _held_out(self) -> list[dict[str, Tensor]]:
        lines = _lines(self.text)[:_HELD_OUT_LINES]
        if not lines:
            raise UsageError("the held-out text holds no line of some length to measure with")
        return self._batches(sorted(lines, key=len), 16, 128)

    def _batches(self, lines: list[str], size: int, length: int) -> list[dict[str, Tensor]]:
        config: Any = self.subject.model.config
        limit = min(length, getattr(config, "max_position_embeddings", length))
        parts = [lines[at : at + size] for at in range(0, len(lines), size)]
        return [
            dict(
                self.subject.tokenizer(
                    part, padding=True, truncation=True, max_length=limit, return_tensors="pt"
                )
            )
            for part in parts
        ]


@dataclass(frozen=True)
class Outputs:
    """Any other model: cosine similarity of its outputs on batches, inputs per second."""

    batches: Sequence[Batch]
    metric = "mean cosine similarity to the dense outputs"
    better = "higher"

    def quality(self, dense: nn.Module, model: nn.Module) -> float:
        """Of `model`; see `embedding_similarity`."""
        return 1.0 if model is dense else embedding_similarity(dense, model, self.batches)

    def speed(self, dense: nn.Module, sparse: nn.Module | CompressResult, tokens: int) -> Speed:
        """Running all batches."""
        return encode_speed(dense, sparse, self.batches)


Task = Language | Encoder


def task_of(subject: Subject, text: bytes) -> Task:
    """The task by the kind of model."""
    return Language(subject, text) if subject.causal else Encoder(subject, text)


def is_causal(model: nn.Module) -> bool:
    """Whether it is a language model that continues its text."""
    asked = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    return callable(asked) and asked() and not getattr(config, "is_encoder_decoder", False)


def _windows(
    subject: Subject, data: bytes, n: int, length: int, seed: int
) -> list[dict[str, Tensor]]:
    """`n` random windows of `length` tokens, in batches of 8."""
    ids = subject.ids(data)
    if ids.numel() <= length:
        raise UsageError(f"--data holds {ids.numel()} tokens; windows of {length} need more text")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, ids.numel() - length, (n,), generator=generator).tolist()
    rows = torch.stack([ids[start : start + length] for start in starts])
    return [{"input_ids": part} for part in rows.split(8)]


def _lines(data: bytes) -> list[str]:
    """Lines of some length, each once, in order."""
    lines = (" ".join(line.split()) for line in data.decode("utf-8", "replace").splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) >= 20))
