"""Video-BLADE: what the means add to the blocks, what counting twice costs, and whether sparsity
inside distillation is as good as sparsity added after it."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

import gossamer as gs
from gossamer.claims.attention.psa import smooth
from gossamer.claims.curves import POINTS, CurveModel, misfit, trained
from gossamer.claims.diffusion import off
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.core.denoising import DenoisingStep
from gossamer.methods.attention.psa import over_means

METHOD = gs.attention.VideoBLADE(least=0.3, most=0.3, pool=8, block=32)
STEP = DenoisingStep(0, 4)
FEW, MANY = 4, 50
SPARSE = gs.attention.VideoBLADE(least=0.125, most=0.125, pool=8, block=8)
"""Of the toy: 8 blocks of 8 points."""


def one(seed: int, short: bool) -> dict[str, float]:
    """The attention alone, and distillation with it."""
    return attended(seed, short) | distilled(seed, short)


def attended(seed: int, short: bool) -> dict[str, float]:
    """Errors on smooth keys: blocks alone, with means as published, and merged apart."""
    call = smooth(seed, 256 if short else 512)
    wanted = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
    kept = METHOD.choose(call, 0)
    alone = over_means(call, kept, 1, METHOD.block, METHOD.block)[0][0]
    published = METHOD.attend(call, STEP, None)
    apart = replace(METHOD, disjoint=True).attend(call, STEP, None)
    pairs = call.query.shape[1] * call.queries * call.keys
    return {
        "error, blocks alone": off(alone, wanted),
        "error, as published": off(published.output, wanted),
        "error, disjoint": off(apart.output, wanted),
        "density, blocks alone": float(kept.double().mean()),
        "density, as published": published.pairs / pairs,
        "density, disjoint": apart.pairs / pairs,
    }


def distilled(seed: int, short: bool) -> dict[str, float]:
    """Curves of 4 steps: distilled dense and made sparse after, or sparse inside."""
    teacher = trained(seed, 60 if short else 800)
    found = {
        "misfit, teacher, 50 steps": misfit(drawn(teacher, MANY)),
        "misfit, teacher, 4 steps": misfit(drawn(teacher, FEW)),
    }
    dense, sparse = copy.deepcopy(teacher), copy.deepcopy(teacher)
    distil(dense, teacher, seed, short, None)
    with gs.sparse_denoising(sparse, SPARSE, steps=FEW) as run:
        distil(sparse, teacher, seed, short, run)
    found["misfit, distilled, dense, 4 steps"] = misfit(drawn(dense, FEW))
    for name, student in (("after", dense), ("inside", sparse)):
        with gs.sparse_denoising(student, SPARSE, steps=FEW) as run:
            found[f"misfit, sparse {name}, 4 steps"] = misfit(drawn(student, FEW, run))
    return found


def distil(
    student: CurveModel, teacher: CurveModel, seed: int, short: bool, run: gs.DenoisingRun | None
) -> None:
    """Train the student in place."""
    generator = torch.Generator().manual_seed(seed + 5)
    count = 10 if short else 150
    data = ((torch.randn(32, POINTS, 2, generator=generator), None) for _ in range(count))
    gs.distil_steps(
        student, teacher, copy.deepcopy(teacher), data, steps=FEW, rate=3e-4, fake_rate=1e-3,
        seed=seed, before=int if run is None else run.step,
    )  # fmt: skip


@torch.no_grad()
def drawn(model: CurveModel, steps: int, run: gs.DenoisingRun | None = None) -> Tensor:
    """256 curves by Euler's method from the same noise."""
    x = torch.randn(256, POINTS, 2, generator=torch.Generator().manual_seed(77))
    for number in range(steps):
        if run is not None:
            run.step(number)
        x = x - model(x, torch.full((256,), 1 - number / steps), None) / steps
    return x


def promises(found: Figures) -> list[Promise]:
    """The means help, and more where nothing counts twice."""
    return [
        promise("means and blocks have less error than blocks alone", "quality",
                found["error, blocks alone"], found["error, as published"]),
        promise("without counting twice the error is a tenth or less", "mechanism",
                found["error, as published"], [10 * x for x in found["error, disjoint"]]),
        promise("and fewer pairs are computed", "mechanism", found["density, as published"],
                found["density, disjoint"]),
        promise("distilled with sparsity inside fits no worse than made sparse after", "quality",
                found["misfit, sparse after, 4 steps"], found["misfit, sparse inside, 4 steps"],
                0.005),
        promise("4 distilled sparse steps fit better than the teacher's 4 dense ones", "quality",
                found["misfit, teacher, 4 steps"], found["misfit, sparse inside, 4 steps"]),
        Promise("14.1 times faster than 50 dense steps", "quality", reason="no Wan2.1 here"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.VideoBLADE,
    "Sparse attention trained inside step distillation keeps quality: VBench-2.0 from 0.563 to "
    "0.570, 14.1 times faster.",
    "512 tokens of 2 heads with smooth keys, 0.3 of the blocks of 32 kept, means of 8. "
    "Curves of 64 points: a transformer of 2 layers, distilled to 4 steps in 150 updates.",
    one,
    promises,
)
