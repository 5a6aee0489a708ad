"""A toy of diffusion over sequences: closed curves of points, and a small transformer for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

POINTS = 64


class CurveModel(nn.Module):
    """The velocity of noisy curves (batch, points, 2), by two layers of attention over all points."""

    def __init__(self, width: int = 48, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(2, width)
        turn = torch.arange(POINTS).unsqueeze(1) * (2 * math.pi / POINTS) * torch.arange(1, 9)
        self.register_buffer("place", torch.cat([turn.cos(), turn.sin()], dim=1))
        self.seat, self.time = nn.Linear(16, width), nn.Linear(16, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                          nn.Linear(2 * width, width)) for _ in range(layers)
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor, time: Tensor, told: object) -> Tensor:
        """time: (batch,), 1 for noise; told: nothing."""
        waves = time.unsqueeze(1) * torch.arange(1, 9) * math.pi
        when = self.time(torch.cat([waves.cos(), waves.sin()], dim=1)).unsqueeze(1)
        h = self.enter(x) + self.seat(self.place) + when
        for qkv, project, norm, mlp in zip(
            self.qkv, self.project, self.norms, self.mlp, strict=True
        ):
            parts = qkv(norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            found = nn.functional.scaled_dot_product_attention(*parts)
            h = h + project(found.transpose(1, 2).flatten(2))
            h = h + mlp(h)
        return self.leave(h)


def curves(count: int, generator: torch.Generator) -> Tensor:
    """(count, points, 2): a circle of a random phase, with one of three flowers on it."""
    angle = torch.arange(POINTS) * (2 * math.pi / POINTS)
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    leaves = torch.randint(2, 5, (count, 1), generator=generator)
    radius = 1 + 0.5 * (leaves * (angle + phase)).cos()
    return radius.unsqueeze(-1) * torch.stack(
        [(angle + phase).cos(), (angle + phase).sin()], dim=-1
    )


def trained(seed: int, updates: int) -> CurveModel:
    """A model trained by flow matching."""
    torch.manual_seed(seed)
    model, generator = CurveModel(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    for _ in range(updates):
        x = curves(32, generator)
        noise = torch.randn(x.shape, generator=generator)
        time = torch.rand(32, generator=generator)
        share = time.reshape(-1, 1, 1)
        loss = nn.functional.mse_loss(model((1 - share) * x + share * noise, time, None), noise - x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(True)


def misfit(found: Tensor) -> float:
    """The mean distance of points from the best of all curves, over the mean radius."""
    phases = torch.arange(128) * (2 * math.pi / 128)
    angle = torch.arange(POINTS) * (2 * math.pi / POINTS) + phases.unsqueeze(1)
    every = []
    for leaves in (2, 3, 4):
        radius = 1 + 0.5 * (leaves * angle).cos()
        every.append(radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1))
    known = torch.cat(every).flatten(1)
    apart = torch.cdist(found.flatten(1), known).amin(1) / known.norm(dim=1).mean()
    return float(apart.mean())
