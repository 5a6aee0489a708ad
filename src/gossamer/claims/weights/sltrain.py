"""SLTrain on text: near full rank, and better than low rank or sparse alone at equal parameters?"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.text import RATES, STEPS, LowRank, train, tuned
from gossamer.nn.low_rank_sparse import LowRankSparseLinear
from gossamer.testbed.language import Text

DENSITY = 0.4
METHODS = {
    "full rank": None,
    "sparse alone": gs.weights.StaticRandom(DENSITY, gs.Uniform()),
    "low rank alone": LowRank(),
    "SLTrain": gs.weights.SLTrain(alpha=4.0),
}
"""alpha is about a quarter of the ranks, 11 to 17, as for the paper's smallest model. The default,
16, is meant for rank 256, and diverged here on one seed of seven."""
SLACK = 0.05


def fit(name: str, seed: int, steps: int, rate: float) -> nn.Module:
    """The model trained by one of the ways."""
    problem, method = Text(), METHODS[name]
    model = problem.build(seed)
    if isinstance(method, LowRank | gs.weights.SLTrain):
        gs.replace_layers(model, method, density=DENSITY, seed=seed)
        method = None
    train(problem, model, method, steps, lr=rate, seed=seed)
    return model


@cache
def rates(short: bool) -> dict[str, float]:
    """Of each way; the short form tries none."""
    if short:
        return dict.fromkeys(METHODS, RATES[0])
    return tuned(lambda *how: Text().quality(fit(*how)), list(METHODS), STEPS)


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of each way, and the counts of two."""
    found, models = {}, {}
    for name, rate in rates(short).items():
        models[name] = fit(name, seed, 5 if short else STEPS, rate)
        found[name] = Text().quality(models[name])
        found[f"learning rate, {name}"] = rate
    for name in ("full rank", "low rank alone", "SLTrain"):
        found[f"weights, {name}"] = float(sum(p.numel() for p in models[name].parameters()))
    return found | {
        "bytes of training, SLTrain": float(training_bytes(models["SLTrain"])),
        "bytes of training, full rank": float(training_bytes(models["full rank"])),
        "singular value beyond the rank / largest": beyond(models["SLTrain"]),
    }


def training_bytes(model: nn.Module) -> int:
    """Weights, gradients, both moments of Adam, and the indices of sparse weights."""
    indices = sum(x.support.nbytes for x in model.modules() if isinstance(x, LowRankSparseLinear))
    return indices + 4 * sum(p.nbytes for p in model.parameters())


@torch.no_grad()
def beyond(model: nn.Module) -> float:
    """The smallest over all layers."""
    shares = []
    for layer in model.modules():
        if isinstance(layer, LowRankSparseLinear):
            sizes = torch.linalg.svdvals(layer.fold().weight)
            shares.append(float(sizes[layer.up.shape[1]] / sizes[0]))
    return min(shares)


def promises(found: Figures) -> list[Promise]:
    """What counts say, and bits against the other ways."""
    mine = found["SLTrain"]
    return [
        promise(
            "singular values go on beyond the rank, at 1% of the largest or more",
            "mechanism",
            found["singular value beyond the rank / largest"],
            0.01,
        ),
        promise(
            "fewer weights than low rank alone",
            "mechanism",
            found["weights, low rank alone"],
            found["weights, SLTrain"],
        ),
        promise(
            "fewer bytes of training than full rank, indices counted",
            "mechanism",
            found["bytes of training, full rank"],
            found["bytes of training, SLTrain"],
        ),
        Promise(
            "73% less memory",
            "mechanism",
            reason="the paper claims it of 7 billion parameters, together with an Adam of 8 bits "
            "and updates layer by layer; both belong to the optimizer",
        ),
        promise(
            f"no more than {SLACK:g} bits above full rank",
            "quality",
            found["full rank"],
            mine,
            SLACK,
        ),
        promise("below low rank alone", "quality", found["low rank alone"], mine),
    ]


CLAIM = Claim(
    gs.weights.SLTrain,
    "Pretraining is comparable to full rank, and better than at low rank alone, with up to 73% less "
    "memory.",
    "Python's documentation and code, Llama of 2 blocks and width 64, all linear layers of the "
    f"blocks at {DENSITY:.0%} of their weights, {STEPS} steps of AdamW; bits per byte of held-out "
    "text.",
    one,
    promises,
    remark="Each way's learning rate is the best of four on another seed. Low rank alone begins "
    "with the nearest product to the dense start, and its rank is rounded up. Sparse alone has a "
    "fixed random support; it is as good as SLTrain here, but the paper does not compare with it. "
    "SLTrain has alpha 4, a quarter of its rank as for the paper's smallest "
    "model: with the default, 16, one seed of seven diverged. The run is short: on one seed full "
    "rank had caught up after 500 steps.",
)
