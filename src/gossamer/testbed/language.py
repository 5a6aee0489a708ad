"""Text for a tiny Llama: tens of seconds per training run on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra
from gossamer.core.text import next_token_loss, token_ids, windows
from gossamer.testbed.bundled import calibration_text, heldout_text


@dataclass(frozen=True)
class Text:
    """The next byte of Python's documentation and code; the quality is the bits per byte.

    width, neurons, blocks, heads: of the Llama. context: bytes that it reads. held_out: bytes of
    other files that the quality is measured on.
    """

    width: int = 64
    neurons: int = 176
    blocks: int = 2
    heads: int = 4
    context: int = 64
    batch_size: int = 8
    held_out: int = 32_000
    name: str = "text"
    metric: str = "bits per byte"
    better: str = "lower"
    optimizer: str = "adamw"

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Bytes to train on, and windows (n, context + 1) of held-out bytes."""
        held = token_ids(None, heldout_text()[: self.held_out])
        return token_ids(None, calibration_text()), held.unfold(0, self.context + 1, self.context)

    def build(self, seed: int) -> nn.Module:
        """An untrained LlamaForCausalLM for bytes."""
        torch.manual_seed(seed)
        return llama(
            self.width, self.neurons, self.blocks, self.heads, self.heads, 2 * self.context, 0.05
        )

    def batch(self, step: int, seed: int) -> Tensor:
        """Windows (batch_size, context + 1) of this step, drawn with replacement."""
        ids, _ = self.data
        return windows(ids, self.batch_size, self.context, 7919 * seed + step, ahead=1)

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Cross-entropy on the batch of this step."""
        return next_token_loss(model, self.batch(step, seed))

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """Bits per held-out byte, but for the first one; the model's mode is restored."""
        _, held = self.data
        training = model.training
        model.eval()
        nats = sum(float(next_token_loss(model, part)) * len(part) for part in held.split(64))
        model.train(training)
        return nats / len(held) / math.log(2)

    def inputs(self) -> None:
        """None: there are no batch norms."""
        return None

    def facts(self) -> dict[str, Any]:
        """How windows are drawn."""
        return {"data": self.name, "batch size": self.batch_size, "context": self.context}


def llama(
    width: int, neurons: int, blocks: int, heads: int, groups: int, positions: int,
    spread: float = 0.02, symbols: int = 256, theta: float = 1e4,
) -> nn.Module:  # fmt: skip
    """An untrained Llama, of bytes unless it has other symbols, float32.

    groups: key-value heads. spread: standard deviation of the first weights, which come from torch's
    global generator. theta: of the rotation. Raises MissingExtra without transformers.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    config = LlamaConfig(
        vocab_size=symbols,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=positions,
        initializer_range=spread,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)
