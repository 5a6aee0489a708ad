"""What `compress` and `compare` measure: a language model's text, or an encoder's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.cli.inputs import Subject, windows
from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult
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
            raise UsageError(f"--length {length} exceeds the model's {limit} positions")
        if PROMPT + tokens > limit:
            raise UsageError(
                f"--tokens {tokens} after a prompt of {PROMPT} exceeds the model's {limit} "
                f"positions; give at most {limit - PROMPT}"
            )

    def calibration(self, data: bytes, n: int, length: int, seed: int) -> list[dict[str, Tensor]]:
        """Random windows of tokens."""
        return windows(self.subject, data, n, length, seed)

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
            raise UsageError("--eval-data holds no line of text to measure with")
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


Task = Language | Encoder


def task_of(subject: Subject, text: bytes) -> Task:
    """The task by the kind of model."""
    return Language(subject, text) if subject.causal else Encoder(subject, text)


def _lines(data: bytes) -> list[str]:
    """Lines of some length, each once, in order."""
    lines = (" ".join(line.split()) for line in data.decode("utf-8", "replace").splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) >= 20))
