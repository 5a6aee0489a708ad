"""A small transformer with any attention, and a task of recall over distances, for the claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.nn.attention_gate import rotated

HELD_OUT = 10_000
"""Batches from this number on are never trained on."""


class Chosen(nn.Module):
    """Rotary self-attention whose pairs a method chooses; with None all of them."""

    def __init__(self, width: int, heads: int, method: Any, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.method, self.causal = heads, method, causal
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        size = width // heads
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, size, 2) / size))
        self.frequencies: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        parts = self.mix(x).chunk(3, dim=-1)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        places = torch.arange(x.shape[1])
        query, key = (rotated(p, places, self.frequencies) for p in (query, key))
        if self.method is None:
            found = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            found = gs.attend(query, key, value, self.method, causal=self.causal)
        projected: Tensor = self.project(found.transpose(1, 2).flatten(2))
        return projected


class Model(nn.Module):
    """A transformer of one block for each layer of attention.

    Every token knows the one before it from the start, so that one layer can look up what stood
    behind a token.
    """

    def __init__(self, tokens: int, width: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.own, self.before = nn.Embedding(tokens, width), nn.Embedding(tokens, width)
        self.attention = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * len(layers)))
        self.neurons = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in layers
        )
        self.last, self.head = nn.RMSNorm(width), nn.Linear(width, tokens)
        for table in (self.own, self.before):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, length, tokens)."""
        x = self.own(ids) + F.pad(self.before(ids[:, :-1]), (0, 0, 1, 0))
        for index, (attention, neurons) in enumerate(
            zip(self.attention, self.neurons, strict=True)
        ):
            x = x + attention(self.norms[2 * index](x))
            x = x + neurons(self.norms[2 * index + 1](x))
        logits: Tensor = self.head(self.last(x))
        return logits


@dataclass(frozen=True)
class Recall:
    """Texts in which names come again, each followed by its own word of that text.

    A text has `names` names out of `vocabulary`, each with a word of its own. Its slots of two
    tokens hold a name and its word, or noise with the probability `noise`. Asked is the word behind
    every name that has come before.
    """

    length: int = 128
    names: int = 8
    noise: float = 0.5
    vocabulary: int = 24
    batch_size: int = 16

    @property
    def tokens(self) -> int:
        """Names, words and noise."""
        return 3 * self.vocabulary

    def batch(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """ids (batch, length), and how far back the answer to each place lies, 0 where none is."""
        generator = torch.Generator().manual_seed(100_003 * seed + number)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        rows, slots, count = self.batch_size, self.length // 2, self.vocabulary
        own = torch.rand(rows, count, generator=generator).argsort(1)[:, : self.names]
        words = count + draw(count, rows, self.names)
        which = draw(self.names, rows, slots)
        silent = torch.rand(rows, slots, generator=generator) < self.noise
        hum = 2 * count + draw(count, rows, slots, 2)
        said = torch.stack([own.gather(1, which), words.gather(1, which)], dim=-1)
        ids = torch.where(silent.unsqueeze(-1), hum, said).flatten(1)
        last = torch.full((rows, self.names), -1)
        back = torch.zeros_like(ids)
        for slot in range(slots):
            at = which[:, slot : slot + 1]
            known = last.gather(1, at)
            asked = (known >= 0) & ~silent[:, slot : slot + 1]
            back[:, 2 * slot] = torch.where(asked, 2 * (slot - known) - 1, 0).squeeze(1)
            heard = torch.where(silent[:, slot : slot + 1], known, torch.full_like(known, slot))
            last.scatter_(1, at, heard)
        return ids, back

    def loss(self, model: nn.Module, number: int, seed: int) -> Tensor:
        """Cross-entropy of the words that are asked for."""
        ids, back = self.batch(number, seed)
        asked = back[:, :-1] > 0
        return F.cross_entropy(model(ids)[:, :-1][asked], ids[:, 1:][asked])

    @torch.no_grad()
    def accuracy(
        self, model: nn.Module, seed: int, counts: Callable[[Tensor, Tensor], Tensor], batches: int
    ) -> float:
        """Of held-out answers that `counts(place, distance)`, both (batch, length), picks out."""
        model.eval()
        right = total = 0
        for number in range(HELD_OUT, HELD_OUT + batches):
            ids, back = self.batch(number, seed)
            place = torch.arange(self.length).expand_as(ids)
            picked = ((back > 0) & counts(place, back))[:, :-1]
            guess = model(ids)[:, :-1].argmax(-1)
            right += int((guess == ids[:, 1:])[picked].sum())
            total += int(picked.sum())
        return right / max(1, total)


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    after: Callable[[], object] = lambda: None,
) -> None:
    """AdamW, a warm-up over a tenth of the steps, then half a cosine; gradients clipped to 1."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(1.0, (t + 1) / warm) * (1 + math.cos(math.pi * t / steps)) / 2,
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after()
