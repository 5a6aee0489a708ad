"""BiFormer on maps with two distant objects: does routing see both, and a window of as many keys not?"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.claims.layers import best_rates, fit
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.methods.attention.biformer import cut

SIDE, REGIONS, ROUTES, COLOURS, WIDTH = 28, 7, 4, 5, 16
WAYS = ("dense", "BiFormer", "window")
STEPS, BATCH, SLACK = 200, 16, 0.02
Batch = tuple[Tensor, Tensor, Tensor]


def maps(count: int, generator: torch.Generator) -> Batch:
    """Noisy maps (count, 3, 28, 28) with two squares at least 12 apart, labels, and corners.

    The label says whether both have one of five colours. Corners: (count, 2, 2), row and column.
    """
    palette = torch.randn(COLOURS, 3, generator=torch.Generator().manual_seed(5)).sign()
    palette = palette + 0.5 * torch.randn(COLOURS, 3, generator=torch.Generator().manual_seed(6))
    x = 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    label = torch.arange(count) % 2
    first = torch.randint(0, COLOURS, (count,), generator=generator)
    other = (first + torch.randint(1, COLOURS, (count,), generator=generator)) % COLOURS
    colours = torch.stack([first, torch.where(label == 1, first, other)], 1)
    corners = torch.randint(0, SIDE - 4, (count, 2, 2), generator=generator)
    far = torch.randint(12, SIDE - 12, (count,), generator=generator)
    axis = torch.randint(0, 2, (count,), generator=generator)
    rows = torch.arange(count)
    corners[rows, 1, axis] = (corners[rows, 0, axis] + far) % (SIDE - 3)
    near = (corners[:, 0] - corners[:, 1]).abs().amax(1) < 12
    corners[near, 0], corners[near, 1] = torch.tensor([2, 3]), torch.tensor([20, 19])
    for i in range(count):
        for (row, column), colour in zip(corners[i].tolist(), colours[i].tolist(), strict=True):
            x[i, :, row : row + 4, column : column + 4] += palette[colour][:, None, None]
    return x, label, corners


class Network(nn.Module):
    """One layer of attention between perceptrons of single pixels; the largest pixel decides.

    So only what one pixel attends can tell the labels apart.
    """

    def __init__(self, way: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))
        regions, routes = (1, 1) if way == "dense" else (REGIONS, ROUTES)
        self.attention = gs.attention.BiFormer(WIDTH, 2, regions, routes, local=1)
        if way == "window":
            self.attention.choose = window  # type: ignore[method-assign]
        self.read = nn.Sequential(nn.Conv2d(WIDTH, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 1))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The logit of one colour, (batch,)."""
        hidden = self.embed(x)
        hidden = hidden + self.attention(hidden)
        found: Tensor = self.read(hidden).flatten(1).logsumexp(1) - self.shift
        return found


def window(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """Two by two regions around each region, shifted as the region lies in its pair."""
    place = torch.arange(REGIONS).clamp(max=REGIONS - 2)
    near = torch.arange(REGIONS) - place.unsqueeze(1)
    side = (near == 0) | (near == 1)
    both = side[:, None, :, None] & side[None, :, None, :]
    return both.reshape(1, REGIONS**2, REGIONS**2).expand(len(query), -1, -1)


def trained(way: str, seed: int, steps: int, rate: float) -> Network:
    """After training on fresh maps."""
    model, generator = Network(way, seed), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        x, label, _ = maps(BATCH, generator)
        return F.binary_cross_entropy_with_logits(model(x), label.float())

    fit(model.parameters(), loss, steps, rate)
    return model.eval()


@torch.no_grad()
def accuracy(model: Network, seed: int) -> float:
    """On held-out maps."""
    x, label, _ = maps(300, torch.Generator().manual_seed(10**6 + seed))
    said = torch.cat([model(part) for part in x.split(50)]) > 0
    return float((said == label.bool()).double().mean())


@torch.no_grad()
def partner_seen(model: Network, seed: int) -> float:
    """Where colours are the same: how often the first object's region attends the other's."""
    x, label, corners = maps(300, torch.Generator().manual_seed(10**6 + seed))
    layer, same = model.attention, label == 1
    query, key, _ = layer.qkv(model.embed(x[same])).chunk(3, 1)
    real = torch.ones(REGIONS**2, (SIDE // REGIONS) ** 2, dtype=torch.bool)
    routes = layer.choose(cut(query, REGIONS), cut(key, REGIONS), real)
    region = (corners[same] + 2) // (SIDE // REGIONS)
    region = region[..., 0] * REGIONS + region[..., 1]
    return float(routes[torch.arange(len(region)), region[:, 0], region[:, 1]].double().mean())


@torch.no_grad()
def dense_error(seed: int) -> float:
    """The largest difference of all routes from attention without regions, over the largest output."""
    torch.manual_seed(seed)
    layer = gs.attention.BiFormer(WIDTH, 2, REGIONS, REGIONS**2)
    whole = gs.attention.BiFormer(WIDTH, 2, 1, 1)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, WIDTH, SIDE, SIDE)
    return float((layer(x) - whole(x)).abs().max() / whole(x).abs().max())


@cache
def rates(short: bool) -> dict[str, float]:
    """Of each way; the short form tries none."""
    if short:
        return dict.fromkeys(WAYS, 1e-2)
    return best_rates(lambda way, seed, rate: accuracy(trained(way, seed, STEPS, rate), seed), WAYS)


def one(seed: int, short: bool) -> dict[str, float]:
    """Accuracy of each way, and how often the other object is seen."""
    found: dict[str, Any] = {}
    for way in WAYS:
        model = trained(way, seed, 3 if short else STEPS, rates(short)[way])
        found[f"accuracy, {way}"] = accuracy(model, seed)
        if way != "dense":
            found[f"partner seen, {way}"] = partner_seen(model, seed)
    return found | {"error of all routes": dense_error(seed)}


def promises(found: Figures) -> list[Promise]:
    """What is exact, what is seen, and what it is worth."""
    mine = found["accuracy, BiFormer"]
    return [
        promise(
            "all routes are dense attention, to 1e-5", "mechanism",
            [1e-5 - x for x in found["error of all routes"]],
        ),
        promise(
            "the other object is seen more often than by a window of as many keys", "mechanism",
            found["partner seen, BiFormer"], found["partner seen, window"],
        ),
        promise(
            "more accurate than a window of as many keys", "quality",
            mine, found["accuracy, window"],
        ),
        promise(
            f"accuracy no more than {SLACK:g} below dense", "quality",
            mine, found["accuracy, dense"], SLACK,
        ),
        Promise(
            "83.8% on ImageNet-1K at 4.5 GFLOPs", "quality", reason="the data are not within reach"
        ),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.BiFormer,
    "BiFormer-S reaches 83.8% on ImageNet-1K with 4.5 GFLOPs.",
    f"Synthetic maps of {SIDE} by {SIDE} with two distant squares that have one colour or two; "
    f"{ROUTES} of {REGIONS**2} regions, {STEPS} steps of AdamW. Each pixel decides by what it "
    "attends.",
    one,
    promises,
    remark="Each way's learning rate is the better of two on another seed.",
)
