"""A small video diffusion transformer and its world of moving shapes.

Videos have 8 frames of 32 x 32 pixels: one shape of a colour on a smooth background, which moves in
a direction at a speed and bounces off the walls. Four words say which. The model reads patches of
2 x 2 pixels, so 2048 tokens, behind the four words in one sequence, and predicts the velocity of
flow matching. Attention goes through torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COLOURS = ((1.0, -0.6, -0.6), (-0.6, 0.9, -0.6), (-0.5, -0.3, 1.0), (1.0, 0.9, -0.6),
           (-0.6, 0.9, 0.9), (0.9, -0.4, 0.9))  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring")
DIRECTIONS, SPEEDS = 8, (1.0, 2.5)
WORDS = (len(COLOURS), len(SHAPES), DIRECTIONS, len(SPEEDS))
"""How many words each of the four places has; one more stands for none."""
FRAMES, SIZE, PATCH, CHANNELS = 8, 32, 2, 3


@dataclass(frozen=True)
class Sizes:
    """Of the transformer."""

    width: int = 128
    heads: int = 4
    blocks: int = 4
    neurons: int = 512


class VideoTransformer(nn.Module):
    """Predicts the velocity of noisy videos: (batch, frames, 3, height, width) to the same."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.patches = nn.Linear(CHANNELS * PATCH**2, width)
        self.words = nn.ModuleList(nn.Embedding(count + 1, width) for count in WORDS)
        change = nn.Linear(width, 6 * width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), change)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.shift = nn.Parameter(torch.zeros(2, width))
        self.out = nn.Linear(width, CHANNELS * PATCH**2)
        for layer in (self.out, change):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, video: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """time: (batch,) in [0, 1], 1 for noise. words: int64 (batch, 4)."""
        frames, height, width = video.shape[1], video.shape[3] // PATCH, video.shape[4] // PATCH
        tokens = self.patches(patchify(video))
        text = torch.stack([each(words[:, i]) for i, each in enumerate(self.words)], dim=1)
        x = torch.cat([text, tokens], dim=1)
        change = self.time(_waves(time, 64).to(x.dtype)).unflatten(-1, (6, -1))
        angles = positions(frames, height, width, self.sizes.width // self.sizes.heads)
        angles = F.pad(angles, (0, 0, text.shape[1], 0)).to(x.device)  # text is not rotated
        turn = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        for block in self.blocks:
            x = block(x, change, turn)
        x = self.norm(x[:, text.shape[1] :])
        shift, scale = (change[:, :2] + self.shift).unsqueeze(2).unbind(1)
        return unpatchify(self.out(x * (1 + scale) + shift), frames, height, width)


class _Block(nn.Module):
    """Attention over text and all frames together, then a feed-forward network."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, sizes.neurons), nn.Linear(sizes.neurons, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.change = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, change: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        a, b, gate, c, d, gate2 = (change + self.change).unsqueeze(2).unbind(1)
        inner = self.norms[0](x) * (1 + b) + a
        q, k, v = self.qkv(inner).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotated(F.rms_norm(part, part.shape[-1:]), *turn) for part in (q, k))
        found = F.scaled_dot_product_attention(q, k, v)
        x = x + gate * self.project(found.transpose(1, 2).flatten(2))
        inner = self.norms[1](x) * (1 + d) + c
        return x + gate2 * self.down(F.gelu(self.up(inner)))


def patchify(video: Tensor) -> Tensor:
    """(batch, frames, 3, height, width) to (batch, tokens, 3 * 2 * 2), frame after frame."""
    x = video.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """The inverse, for so many tokens a side."""
    x = tokens.unflatten(2, (CHANNELS, PATCH, PATCH)).unflatten(1, (frames, height, width))
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def positions(frames: int, height: int, width: int, size: int) -> Tensor:
    """Angles (tokens, size / 2) of a rotation by frame, row and column."""
    pairs = size // 2
    parts = (pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8)
    grid = torch.meshgrid(*(torch.arange(float(n)) for n in (frames, height, width)), indexing="ij")
    found = []
    for place, count in zip(grid, parts, strict=True):
        speed = 2.0 ** -torch.linspace(0, 4, count)
        found.append(place.reshape(-1, 1) * speed)
    return torch.cat(found, dim=1)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (..., tokens, width), its halves turned by an angle each."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cosine - two * sine, one * sine + two * cosine], dim=-1)


def _waves(time: Tensor, size: int) -> Tensor:
    speed = torch.exp(torch.linspace(0, math.log(1000.0), size // 2, device=time.device))
    angles = time.float().unsqueeze(-1) * speed
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def videos(
    count: int, generator: torch.Generator, frames: int = FRAMES, size: int = SIZE
) -> tuple[Tensor, Tensor]:
    """Videos float32 (count, frames, 3, size, size) in [-1, 1], and words int64 (count, 4)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    words = torch.stack([(uniform(count) * n).long() for n in WORDS], dim=1)
    angle = words[:, 2] * (2 * math.pi / DIRECTIONS)
    speed = torch.tensor(SPEEDS)[words[:, 3]]
    step = torch.stack([angle.sin(), angle.cos()], dim=1) * speed.unsqueeze(1)
    radius = 3 + 2 * uniform(count)
    room = (size - 1 - 2 * radius).unsqueeze(1)
    start = uniform(count, 2) * room
    moved = start.unsqueeze(1) + step.unsqueeze(1) * torch.arange(float(frames)).reshape(1, -1, 1)
    room = room.unsqueeze(1)
    folded = moved.remainder(2 * room)  # bounces off the walls
    centre = torch.where(folded > room, 2 * room - folded, folded) + radius.reshape(-1, 1, 1)
    line = torch.arange(float(size))
    dy = (line - centre[..., 0:1]).unsqueeze(-1)
    dx = (line - centre[..., 1:2]).unsqueeze(-2)
    inside = _inside(dy, dx, radius.reshape(-1, 1, 1, 1), words[:, 1].reshape(-1, 1, 1, 1))
    colour = torch.tensor(COLOURS)[words[:, 0]].reshape(count, 1, 3, 1, 1)
    coarse = 0.5 * torch.randn((count, 3, 4, 4), generator=generator) - 0.3
    ground = F.interpolate(coarse, (size, size), mode="bicubic").clamp(-0.9, 0.5).unsqueeze(1)
    return ground + (colour - ground) * inside.unsqueeze(2), words


def _inside(dy: Tensor, dx: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """How much of each pixel is in the shape, in [0, 1], with soft edges."""
    far = (dy**2 + dx**2).sqrt()
    square = torch.maximum(dy.abs(), dx.abs()) * 1.15
    triangle = torch.maximum(dy, 0.87 * dx.abs() - 0.5 * dy) * 1.5
    ring = (far - 0.7 * radius).abs() + 0.7 * radius
    distance = torch.where(shape == 0, far, torch.where(shape == 1, square, triangle))
    distance = torch.where(shape == 3, ring, distance)
    return (radius - distance + 0.5).clamp(0, 1)


def loss(model: nn.Module, video: Tensor, words: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The mean squared error of the velocity noise - video at times (batch,)."""
    share = time.reshape(-1, 1, 1, 1, 1)
    found = model((1 - share) * video + share * noise, time, words)
    return F.mse_loss(found.float(), noise - video)


@torch.no_grad()
def denoising_loss(
    model: nn.Module, seed: int, times: Sequence[float], count: int = 4,
    before: Callable[[int], object] = int,
) -> float:  # fmt: skip
    """The mean loss on held-out videos over so many times, on the way from one noise.

    times: from noisy to clean, as a sampler passes them. before: called with the step's number before the model, as `run.step` wants it.
    """
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    video, words = videos(count, generator)
    noise, total = torch.randn(video.shape, generator=generator), 0.0
    for number, time in enumerate(times):
        before(number)
        total += float(loss(model, video, words, noise, torch.full((count,), time)))
    return total / len(times)


@torch.no_grad()
def sample(
    model: nn.Module,
    words: Tensor,
    seed: int,
    steps: int = 20,
    guidance: float = 1.0,
    before: Callable[[int, str], object] = lambda number, branch: None,
) -> Tensor:
    """Videos from noise of a seed by Euler's method, in equal steps of time from 1 to 0.

    words: int64 (batch, 4). guidance: above 1, a second forward without words in each step.
    before: called with the step's number and the branch, `text` or `none`, before each forward.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(words), FRAMES, CHANNELS, SIZE, SIZE, generator=generator)
    nothing = torch.tensor(WORDS).expand(len(words), -1)
    for number in range(steps):
        time = torch.full((len(words),), 1 - number / steps)
        before(number, "text")
        velocity = model(x, time, words)
        if guidance != 1:
            before(number, "none")
            plain = model(x, time, nothing)
            velocity = plain + guidance * (velocity - plain)
        x = x - velocity / steps
    return x


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of videos in [-1, 1], in decibels, the mean over videos."""
    error = (found.clamp(-1, 1) - wanted.clamp(-1, 1)).double().square().flatten(1).mean(1)
    return float((10 * (4 / error.clamp(min=1e-12)).log10()).mean())


def video_transformer() -> VideoTransformer:
    """The bundled model, float32 and in evaluation mode."""
    from safetensors.torch import load

    data = (resources.files("gossamer.testbed") / "data" / "video.safetensors").read_bytes()
    model = VideoTransformer()
    state: dict[str, Any] = {name: x.float() for name, x in load(data).items()}
    model.load_state_dict(state)
    return model.eval()
