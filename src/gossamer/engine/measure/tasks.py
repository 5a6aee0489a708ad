"""What comparisons measure: a language model's text, an encoder's lines, or any model's batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import CompressResult
from gossamer.core.text import encode, padded, text_batches, token_ids
from gossamer.engine.data import Batch
from gossamer.engine.measure.evaluate import (
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
        return lambda data: encode(self.tokenizer, data.decode("utf-8", "replace"))

    def ids(self, data: bytes) -> Tensor:
        """int64 (tokens,)."""
        return token_ids(self.tokenizer, data)


@dataclass(frozen=True)
class Language:
    """A causal language model: bits per byte of held-out text, greedy decoding."""

    subject: Subject
    text: bytes
    progress: bool = False
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
        return text_batches(self.subject.tokenizer, data, n, length, seed=seed)

    def quality(self, dense: nn.Module, model: nn.Module) -> float:
        """Of `model`; float32 arithmetic."""
        name = _quality(dense, model) if self.progress else ""
        return bits_per_byte(model, self.text, encode=self.subject.encode, progress=name)

    def speed(self, dense: nn.Module, sparse: nn.Module | CompressResult, tokens: int) -> Speed:
        """Decoding `tokens` tokens after a prompt from the held-out text."""
        prompt = self.subject.ids(self.text[:4096])[:PROMPT].unsqueeze(0)
        return decode_speed(dense, sparse, prompt, tokens, progress=self.progress)


@dataclass(frozen=True)
class Encoder:
    """Any other model of text: cosine similarity of its outputs on held-out lines, inputs per second.

    What is compared is the embedding of an encoder and the logits of models with a head. An
    encoder-decoder reads each line on both sides.
    """

    subject: Subject
    text: bytes
    progress: bool = False
    better = "higher"

    @property
    def metric(self) -> str:
        """By what the model puts out."""
        plain = type(self.subject.model).__name__.endswith("Model")
        return f"mean cosine similarity to the dense {'embeddings' if plain else 'outputs'}"

    def check(self, length: int, tokens: int) -> None:
        """Lines are cut to the model's positions, so any length will do."""

    def calibration(self, data: bytes, n: int, length: int, seed: int) -> list[dict[str, Tensor]]:
        """`n` random lines, cut to `length` tokens, in padded batches of 8."""
        lines = _lines(data)
        if not lines:
            raise UsageError("the text holds no line of 20 characters to calibrate with")
        limit = self._limit(length)
        return self._both(text_batches(self.subject.tokenizer, lines, n, limit, seed=seed))

    def quality(self, dense: nn.Module, model: nn.Module) -> float:
        """Of `model`; float32 arithmetic."""
        if model is dense:
            return 1.0
        name = "quality of the sparse model" if self.progress else ""
        return embedding_similarity(dense, model, self._held_out(), progress=name)

    def speed(self, dense: nn.Module, sparse: nn.Module | CompressResult, tokens: int) -> Speed:
        """Encoding the held-out lines in batches of 16."""
        return encode_speed(dense, sparse, self._held_out(), progress=self.progress)

    def _held_out(self) -> list[dict[str, Tensor]]:
        lines = _lines(self.text)[:_HELD_OUT_LINES]
        if not lines:
            raise UsageError("the held-out text holds no line of 20 characters to measure with")
        tokenizer, limit = self.subject.tokenizer, self._limit(128)
        return self._both(padded(tokenizer, sorted(lines, key=len), limit, 16))

    def _limit(self, length: int) -> int:
        config: Any = self.subject.model.config
        return min(length, getattr(config, "max_position_embeddings", None) or length)

    def _both(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """For an encoder-decoder, with the same tokens as what the decoder has written so far."""
        if not getattr(self.subject.model.config, "is_encoder_decoder", False):
            return batches
        return [
            {**batch, "decoder_input_ids": batch["input_ids"],
             "decoder_attention_mask": batch["attention_mask"]}
            for batch in batches
        ]  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """Any model on batches: cosine similarity of its outputs, inputs per second."""

    batches: Sequence[Batch]
    progress: bool = False
    metric = "mean cosine similarity to the dense outputs"
    better = "higher"

    def quality(self, dense: nn.Module, model: nn.Module) -> float:
        """Of `model`; see `embedding_similarity`."""
        if model is dense:
            return 1.0
        name = "quality of the sparse model" if self.progress else ""
        return embedding_similarity(dense, model, self.batches, progress=name)

    def speed(self, dense: nn.Module, sparse: nn.Module | CompressResult, tokens: int) -> Speed:
        """Running all batches."""
        return encode_speed(dense, sparse, self.batches, progress=self.progress)


Task = Language | Encoder


def task_of(subject: Subject, text: bytes, progress: bool = False) -> Task:
    """The task by the kind of model."""
    return (Language if subject.causal else Encoder)(subject, text, progress)


def is_causal(model: nn.Module) -> bool:
    """Whether it is a language model that continues its text."""
    asked = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    return callable(asked) and asked() and not getattr(config, "is_encoder_decoder", False)


_SEEN = ("pixel_values", "input_features", "input_values")
"""What models of images and speech read."""


def main_input(model: nn.Module) -> str:
    """The name of what the model reads, as transformers gives it; empty for other modules."""
    name = str(getattr(model, "main_input_name", ""))
    if name != "input_ids" or is_causal(model):
        return name
    takes = inspect.signature(model.forward).parameters
    return " and ".join([name, *(each for each in _SEEN if each in takes)])


def reads_text(model: nn.Module) -> bool:
    """Whether it is a model of transformers that reads tokens alone, or continues text."""
    return main_input(model) == "input_ids" and hasattr(model, "config")


def _quality(dense: nn.Module, model: nn.Module) -> str:
    return f"quality of the {'dense' if model is dense else 'sparse'} model"


def _lines(data: bytes) -> list[str]:
    """Lines of some length, each once, in order."""
    lines = (" ".join(line.split()) for line in data.decode("utf-8", "replace").splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) >= 20))
