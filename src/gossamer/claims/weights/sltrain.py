"""SLTrain on text: near full rank, and better than low rank or sparse alone at equal parameters?"""

from __future__ import annotations

import torch
from torch import nn

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.claims.text import LowRank, best, train
from gossamer.nn.low_rank_sparse import LowRankSparseLinear
from gossamer.testbed.language import Text

DENSITY = 0.4
RATES = (3e-3, 1e-2, 3e-2)
SLACK = 0.05


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of four ways at three learning rates, and the counts of two."""
    steps, problem, found = 10 if short else 500, Text(), {}
    for rate in RATES:
        dense = problem.build(seed)
        train(problem, dense, None, steps, lr=rate, seed=seed)
        found[f"full rank, {rate:g}"] = problem.quality(dense)
        sparse = problem.build(seed)
        fixed = gs.weights.StaticRandom(DENSITY, gs.Uniform())
        train(problem, sparse, fixed, steps, lr=rate, seed=seed)
        found[f"sparse alone, {rate:g}"] = problem.quality(sparse)
        for name, method in (("low rank alone", LowRank()), ("SLTrain", gs.weights.SLTrain())):
            model = problem.build(seed)
            replaced = gs.replace_layers(model, method, density=DENSITY, seed=seed)
            train(problem, model, None, steps, lr=rate, seed=seed)
            found[f"{name}, {rate:g}"] = problem.quality(model)
            found[f"density, {name}"] = replaced.measured_density
    return found | {
        "bytes of training, SLTrain": float(training_bytes(model)),
        "bytes of training, full rank": float(training_bytes(dense)),
        "singular value beyond the rank / largest": beyond(model),
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
    """Each way at its best learning rate."""
    mine, full, low, sparse = (
        best(found, f"{name}, ")
        for name in ("SLTrain", "full rank", "low rank alone", "sparse alone")
    )
    return [
        promise(
            "singular values go on beyond the rank, at 1% of the largest or more",
            "mechanism",
            found["singular value beyond the rank / largest"],
            0.01,
        ),
        promise(
            "no more weights than low rank alone",
            "mechanism",
            found["density, low rank alone"],
            found["density, SLTrain"],
            1e-9,
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
            f"{mine} no more than {SLACK:g} bits above {full}",
            "quality",
            found[full],
            found[mine],
            SLACK,
        ),
        promise(f"{mine} below {low}", "quality", found[low], found[mine]),
        promise(f"{mine} below {sparse}", "quality", found[sparse], found[mine]),
    ]


CLAIM = Claim(
    gs.weights.SLTrain,
    "Pretraining is comparable to full rank, and better than at low rank alone, with up to 73% less "
    "memory.",
    "Python's documentation and code, Llama of 2 blocks and width 64, all linear layers of the "
    f"blocks at {DENSITY:.0%} of their weights, 500 steps of AdamW; bits per byte of held-out text.",
    one,
    promises,
    remark="All four have the same grid of learning rates; of each the best is taken on the same "
    "held-out text. Low rank alone begins with the nearest product to the dense start, and has a "
    "rank rounded up, so never fewer weights.",
)
