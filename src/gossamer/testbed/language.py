"""Text for a tiny Llama: tens of seconds per training run on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import MissingExtra
from gossamer.core.text import token_ids
from gossamer.testbed import calibration_text, heldout_text


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

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Bytes to train on, and windows (n, context + 1) of held-out bytes."""
        held = token_ids(None, heldout_text()[: self.held_out])
        return token_ids(None, calibration_text()), held.unfold(0, self.context + 1, self.context)

    def build(self, seed: int) -> nn.Module:
        """An untrained LlamaForCausalLM for bytes."""
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise MissingExtra("transformers", "hf") from None
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=self.neurons,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2 * self.context,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    def batch(self, step: int, seed: int) -> Tensor:
        """Windows (batch_size, context + 1) of this step, drawn with replacement."""
        ids, _ = self.data
        generator = torch.Generator().manual_seed(7919 * seed + step)
        last = len(ids) - self.context
        starts = torch.randint(0, last, (self.batch_size, 1), generator=generator)
        return ids[starts + torch.arange(self.context + 1)]

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Cross-entropy on the batch of this step."""
        return _nats(model, self.batch(step, seed))

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """Bits per held-out byte, but for the first one; the model's mode is restored."""
        _, windows = self.data
        training = model.training
        model.eval()
        nats = sum(float(_nats(model, part)) * len(part) for part in windows.split(64))
        model.train(training)
        return nats / len(windows) / math.log(2)


def _nats(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean over all bytes but the first of each row."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
