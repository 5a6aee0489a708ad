"""DRSformer on photographs with synthetic rain: do several top-k maps clean better than a whole one?"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.claims.layers import best_rates, fit
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.methods.attention.drsformer import SHARES, MixedScaleFeedForward

WIDTH, SIDE, BATCH, STEPS = 16, 32, 4, 150
WAYS = {"whole map": (1.0,), "half of it": (1 / 2,), "four shares": SHARES}


@cache
def photographs() -> tuple[Tensor, Tensor]:
    """Two photographs of scikit-learn, (3, height, width) in [0, 1]: one to train, one held out."""
    from sklearn.datasets import load_sample_images

    return tuple(
        torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images
    )  # type: ignore[return-value]


def rainy(image: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops under streaks of one direction each, and the same without."""
    clean, rain = [], []
    for _ in range(count):
        top, left = (
            int(torch.randint(0, side - SIDE, (), generator=generator)) for side in image.shape[1:]
        )
        clean.append(image[:, top : top + SIDE, left : left + SIDE])
        drops = (torch.rand(SIDE, SIDE, generator=generator) < 0.04).float()
        slope = float(torch.rand((), generator=generator)) - 0.5
        line = torch.zeros(9, 9)
        for step in range(-4, 5):
            line[4 + step, 4 + round(slope * step)] = 0.6
        streaks = F.conv2d(drops[None, None], line[None, None], padding=4)[0]
        rain.append(streaks.clamp(max=0.8))
    return torch.stack(clean) + torch.stack(rain), torch.stack(clean)


class Network(nn.Module):
    """Two blocks at full and one at half the resolution, with a skip; the rain is predicted."""

    def __init__(self, way: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.leave = (
            nn.Conv2d(3, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, 3, 3, padding=1),
        )
        self.down, self.up = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(_Block(way, heads) for heads in (1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The clean image."""
        first = self.blocks[0](self.enter(x))
        low = self.blocks[1](self.down(first))
        clean: Tensor = x - self.leave(self.blocks[2](first + self.up(low)))
        return clean


class _Block(nn.Module):
    def __init__(self, way: str, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, WIDTH) for _ in range(2))
        self.attention = gs.attention.DRSformer(WIDTH, heads, WAYS[way])
        self.step = MixedScaleFeedForward(WIDTH, 2.0)
        with torch.no_grad():  # the sum of the weights is the same for all
            self.attention.weights.fill_(0.8 / len(WAYS[way]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.step(self.norms[1](x))


def quality(way: str, seed: int, rate: float, steps: int = STEPS) -> float:
    """Decibels (PSNR) on crops of the other photograph after training."""
    model, generator = Network(way, seed), torch.Generator().manual_seed(seed)
    train, held = photographs()

    def loss(step: int) -> Tensor:
        x, wanted = rainy(train, BATCH, generator)
        return F.l1_loss(model(x), wanted)

    fit(model.parameters(), loss, steps, rate)
    x, wanted = rainy(held, 64, torch.Generator().manual_seed(10**6 + seed))
    with torch.no_grad():
        found = model.eval()(x)
    return -10 * math.log10(float((found.clamp(0, 1) - wanted).square().mean()))


@cache
def rates(short: bool) -> dict[str, float]:
    """Of each way; the short form tries none."""
    return dict.fromkeys(WAYS, 3e-3) if short else best_rates(quality, tuple(WAYS))


def one(seed: int, short: bool) -> dict[str, float]:
    """Decibels of each way, and two figures of the map."""
    steps = 2 if short else STEPS
    found = {way: quality(way, seed, rates(short)[way], steps) for way in WAYS}
    torch.manual_seed(seed)
    layer = gs.attention.DRSformer(WIDTH)
    query, key, _ = layer.parts(torch.randn(1, WIDTH, 8, 8))
    sums = layer.map(query, key).sum(-1) - layer.weights.sum()
    return found | {"error of the rows' sums": float(sums.detach().abs().max())}


def promises(found: Figures) -> list[Promise]:
    """What is exact, and decibels against the other ways."""
    mine = found["four shares"]
    return [
        promise(
            "rows of the mixed map sum to the weights, to 1e-5", "mechanism",
            [1e-5 - x for x in found["error of the rows' sums"]],
        ),
        promise("above a whole map", "quality", mine, found["whole map"]),
        promise("above one half of it", "quality", mine, found["half of it"]),
        Promise(
            "favourable results on Rain200H, Rain200L, DID, DDN and SPA", "quality",
            reason="the data are not within reach",
        ),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.DRSformer,
    "The network compares favourably with others on five sets of rainy images.",
    f"Crops of {SIDE} by {SIDE} pixels of two photographs under synthetic streaks, one to train and "
    f"one held out; three blocks of width {WIDTH}, {STEPS} steps of AdamW; decibels.",
    one,
    promises,
    remark="Each way's learning rate is the better of two on another seed. All ways begin with the "
    "same sum of weights.",
)
