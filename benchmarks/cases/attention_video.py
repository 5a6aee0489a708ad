"""Sparse attention in the bundled video transformer: every method at about equal density.

For each method and density, three seeds: the PSNR of a sample of 10 steps against the dense sample
from the same noise and words, and the denoising loss on a held-out video at five times. Density is of
the whole run, dense steps included: all methods but Sparse-vDiT run the first fifth of the steps
dense. AdaSpa searches in one dense step more, so it is also measured at the others' density where
sparse. The density of Sparse-vDiT is what its search gave. Of one seed, the error of attention on the
same inputs and the operations, choice included, over dense. A random choice of blocks is beside
them. Light Forcing is not, for it wants an autoregressive model. A part that was measured is kept, so
that a stopped run goes on. Writes benchmarks/results/attention_video.json.
Run: OMP_NUM_THREADS=1 python benchmarks/cases/attention_video.py [--only svg2]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import Attended, DenoisingStep
from gossamer.engine.inputs.attend import run_layout
from gossamer.engine.inputs.counting import full_layout, pairs, possible_pairs
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops.attention import Layout, kernel_name
from gossamer.testbed.video import (
    FRAMES,
    PATCH,
    SIZE,
    WORDS,
    denoising_loss,
    psnr,
    sample,
    video_transformer,
)

OUT = Path(__file__).parents[1] / "results" / "attention_video.json"
GRID = gs.TokenGrid(FRAMES, SIZE // PATCH, SIZE // PATCH, text=4)
FIRST = 0.2


@dataclass(frozen=True)
class Plan:
    """What is measured; a record made with another plan is not continued."""

    seeds: int = 3
    steps: int = 10
    times: int = 5


@dataclass(frozen=True)
class Warm:
    """A chooser that looks at no step, behind the same dense steps as the others."""

    method: Any

    @property
    def card(self) -> Any:
        return self.method.card

    def attend(self, call: AttentionCall, step: DenoisingStep, state: Any) -> Attended:
        """Dense at first, then over the chosen pairs."""
        if step.first_share(FIRST):
            return Attended(
                run_layout(call, full_layout(call))[0], possible_pairs(call), kind="dense"
            )
        layout = self.method.layout(call)
        return Attended(run_layout(call, layout)[0], pairs(layout, call))


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks at random, and a query's own."""

    density: float
    block: int = 64
    card = gs.attention.BlockSparse.card

    def layout(self, call: AttentionCall) -> Layout:
        """The same number for each block of queries."""
        blocks = -(-call.keys // self.block)
        generator = torch.Generator().manual_seed(call.layer)
        scores = torch.rand(1, call.query.shape[1], blocks, blocks, generator=generator)
        scores += 2 * torch.eye(blocks)
        kept = gs.keep(scores, gs.TopK(max(1, int(self.density * blocks))))
        return Layout.from_blocks(kept, call.queries, call.keys, self.block, self.block)


def methods() -> dict[str, dict[str, Any]]:
    """By density of the run, then by name. Knobs that are no density were set to come near it."""
    a = gs.attention
    return {
        "0.4": {
            "random blocks": Warm(RandomBlocks(0.25)),
            "blocksparse": Warm(a.BlockSparse(block=64, density=0.25)),
            "adaspa": a.AdaSpa(0.14, first=FIRST, again=0.4),
            "svg2": a.SVG2(64, 128, 0.7, 0.1, FIRST, 0, 20),
            "rettention": a.Rettention(0.15, FIRST, every=8),
            "psa": a.PSA("quota", (0.15, 0.25, 0.25, 0.5), 64, 64, 32, first=FIRST),
            "videoblade": a.VideoBLADE(1.0, 0.1, 0.1, 16, 64, first=FIRST),
            "videoblade, disjoint": a.VideoBLADE(1.0, 0.12, 0.12, 16, 64, True, FIRST),
            "sparsevdit": a.SparseVDiT(penalty=0.1, window=0.3),
        },
        "sparse 0.25": {
            "adaspa": a.AdaSpa(0.25, first=FIRST, again=0.4),
            "adaspa, even heads": a.AdaSpa(0.25, first=FIRST, again=0.4, adaptive=False),
            "sparsevdit, default penalty": a.SparseVDiT(window=0.3),
        },
        "0.6": {
            "random blocks": Warm(RandomBlocks(0.5)),
            "blocksparse": Warm(a.BlockSparse(block=64, density=0.5)),
            "adaspa": a.AdaSpa(0.43, first=FIRST, again=0.4),
            "svg2": a.SVG2(64, 128, 0.87, 0.1, FIRST, 0, 20),
            "rettention": a.Rettention(0.5, FIRST, every=8),
            "psa": a.PSA("quota", (0.4, 0.5, 0.5, 0.8), 64, 64, 32, first=FIRST),
            "videoblade": a.VideoBLADE(1.0, 0.4, 0.4, 16, 64, first=FIRST),
            "videoblade, disjoint": a.VideoBLADE(1.0, 0.4, 0.4, 16, 64, True, FIRST),
            "sparsevdit": a.SparseVDiT(penalty=0.05, window=0.3),
        },
    }


@cache
def model() -> torch.nn.Module:
    return video_transformer()


def words(seed: int) -> Tensor:
    """One video's words."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.stack([torch.randint(n, (1,), generator=generator) for n in WORDS], dim=1)


@cache
def dense_sample(seed: int, steps: int) -> Tensor:
    return sample(model(), words(seed), seed, steps)


def calibrated(method: Any, plan: Plan) -> Any:
    """Patterns from two samples of other seeds, for a method that wants them."""
    if not isinstance(method, gs.attention.SparseVDiT):
        return method

    def draw(run: gs.DenoisingRun) -> None:
        for seed in (50, 51):
            run.reset()
            sample(model(), words(seed), seed, plan.times, before=run.step)

    return gs.calibrate_denoising(model(), method, draw, steps=plan.times, grid=GRID)


def measured(method: Any, seed: int, plan: Plan) -> dict[str, Any]:
    """One seed of one method."""
    with gs.sparse_denoising(model(), method, steps=plan.steps, grid=GRID) as run:
        found = sample(model(), words(seed), seed, plan.steps, before=run.step)
    result = run.result
    with gs.sparse_denoising(
        model(), method, steps=plan.times, grid=GRID, measure=seed == 0
    ) as losing:
        loss = denoising_loss(model(), seed, times(plan), 1, losing.step)
    row = {
        "psnr": psnr(found, dense_sample(seed, plan.steps)),
        "loss": loss,
        "density": result.density,
        "sparse_density": result.sparse_density,
        "search_density": result.search_density,
        "state_bytes": result.state_bytes,
    }
    if seed == 0:
        last = losing.result
        row |= {"error": last.error, "operations_of_dense": last.flops / last.dense_flops}
    return row


def times(plan: Plan) -> list[float]:
    """From noise to video."""
    return [1 - (i + 0.5) / plan.times for i in range(plan.times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan()
    record: dict[str, Any] = {
        "model": "the bundled video transformer, float32, one thread, without guidance",
        "kernel": kernel_name(),
        "metric": "psnr: decibels of the sample against the dense one, higher is better; loss: of "
        "the velocity on held-out videos, lower is better",
        "plan": asdict(plan),
        "machine": machine(),
        "dense": {},
        "parts": {},
    }
    if args.out.exists():
        old = json.loads(args.out.read_text())
        if old["plan"] == record["plan"]:
            record |= {"parts": old["parts"], "dense": old["dense"]}
    for seed in range(plan.seeds):
        if str(seed) not in record["dense"]:
            record["dense"][str(seed)] = denoising_loss(model(), seed, times(plan), 1)
    for density, every in methods().items():
        for name, method in every.items():
            part = record["parts"].setdefault(
                f"{density}: {name}", {"method": repr(method), "seeds": {}}
            )
            if args.only not in f"{density}: {name}" or len(part["seeds"]) == plan.seeds:
                continue
            method = calibrated(method, plan)
            if isinstance(method, gs.attention.SparseVDiT):
                part["patterns"] = {str(k): list(v) for k, v in method.modes.items()}
            for seed in range(plan.seeds):
                if str(seed) not in part["seeds"]:
                    part["seeds"][str(seed)] = measured(method, seed, plan)
                    print(
                        density, name, seed, part["seeds"][str(seed)], file=sys.stderr, flush=True
                    )
                    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
