"""One small valid instance per method, for every test that goes through all methods.

A new topology method enters here, by its card's name. `coupled` are sets of channels of the model
at hand; supports are updated every `every` steps. Variants follow a dash.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import gossamer as gs
from gossamer.core.step import Step
from gossamer.methods import methods
from gossamer.nn.attention_gate import BlockGate


@dataclass(frozen=True)
class Example:
    """make(coupled, every): the method. start, final: its density before and after the run, None
    where it is not given."""

    make: Callable
    start: float | None = 1.0
    final: float | None = 0.2


W = gs.weights
TOPOLOGY = {
    "staticrandom": Example(lambda coupled, every: W.StaticRandom(0.2), 0.2),
    "snip": Example(lambda coupled, every: W.SNIP(0.4), 0.4, 0.4),
    "grasp": Example(lambda coupled, every: W.GraSP(0.4), 0.4, 0.4),
    "synflow": Example(lambda coupled, every: W.SynFlow(0.4, rounds=10), 0.4, 0.4),
    "gmp": Example(lambda coupled, every: W.GMP(0.2, every=every)),
    "gmp-global": Example(
        lambda coupled, every: W.GMP(0.2, every=every, begin=0.2, scope="global")
    ),
    "set": Example(lambda coupled, every: W.SET(0.2, every=every), 0.2),
    "set-spread": Example(lambda coupled, every: W.SET(0.2, every=every, spread=0.1), 0.2),
    "rigl": Example(lambda coupled, every: W.RigL(0.2, every=every), 0.2),
    "granet": Example(lambda coupled, every: W.GraNet(0.2, every=every), 0.5),
    "issp": Example(lambda coupled, every: W.ISSP(0.2)),
    "srste": Example(lambda coupled, every: W.SRSTE(decay=0.01), 0.5, 0.5),
    "sdgf": Example(lambda coupled, every: W.SdGf(), 1.0, 0.5),
    "scl": Example(lambda coupled, every: W.SCL(penalty=0.05, rate=10.0), 1.0, None),
    "wgsef": Example(lambda coupled, every: W.WGSEF(0.25, coupled), 1.0, None),
    "wgsef-weighted": Example(
        lambda coupled, every: W.WGSEF(0.25, coupled, pooled=True, weighted=True), 1.0, None
    ),
    "masksparsity-plain": Example(
        lambda coupled, every: W.MaskSparsity(0.25, coupled, targeted=False), 1.0, 0.25
    ),
    "masksparsity": Example(lambda coupled, every: W.MaskSparsity(0.25, coupled), 1.0, 0.25),
}
"""Methods that choose supports while a model trains."""

LEARNED = {
    "mdgf": lambda: W.MdGf(gs.NM(1, 4)),
    "mdgf-straight": lambda: W.MdGf(decay="exponential", gradient="straight", begin=0.0),
    "maskllm": lambda: W.MaskLLM(rate=0.02),
}
"""Methods that learn or schedule masks through which layers see their weights."""

REPLACERS = {
    "sltrain": lambda: W.SLTrain(),
    "monarch": lambda: W.Monarch(),
    "monarch-random": lambda: W.Monarch(2, "random"),
}
"""Methods that put cheaper layers in the places of ordinary ones; a density of 0.6 suits them."""
PLANNERS = {
    "widths": lambda: W.Widths(),
    "widths-random": lambda: W.Widths(W.Random(3)),
}
"""Methods that cut neurons and heads out of transformers."""

SOURCES = {
    "deepzero": lambda: W.DeepZero(0.3),
    "deepzero-random": lambda: W.DeepZero(0.5, estimator="random", directions=6),
}
"""Methods that estimate gradients from values of the loss."""

RECIPES = {
    "imp": lambda: W.IMP(0.25, rounds=2),
    "imp-late": lambda: W.IMP(0.25, rounds=2, rewind=2),
    "sparsemodelsoups": lambda: W.SparseModelSoups(0.25, rounds=2, members=2),
}
"""Methods that train, prune and train again, down to a density of 0.25."""

INPUTS = {
    "teal": lambda: gs.activations.TEAL(),
    "teal-uniform": lambda: gs.activations.TEAL(allocation="uniform"),
    "teal-token": lambda: gs.activations.TEAL(allocation="uniform", per_token=True),
    "wina": lambda: gs.activations.WINA(),
    "wina-all": lambda: gs.activations.WINA(rotate="all"),
    "wina-plain": lambda: gs.activations.WINA(rotate="off", norms="all", per_token=False),
    "rsparse": lambda: gs.activations.RSparse(),
    "rsparse-half": lambda: gs.activations.RSparse(share=0.5),
}
"""Methods that choose the inputs of linear layers for each token."""

A = gs.attention


def seer(**options):
    """With a random gate for one layer of 4 heads of width 16, 2 of keys."""
    gates = {0: BlockGate(4, 2, 16, 8, torch.Generator().manual_seed(0))}
    return A.SeerAttention(block=16, width=8, gates=gates, **options)


ATTENTION = {
    "streamingllm": lambda: A.StreamingLLM(window=40, block=16),
    "blocksparse": lambda: A.BlockSparse(blocks=3),
    "blocksparse-density": lambda: A.BlockSparse(block=8, density=0.4),
    "verticalslash": lambda: A.VerticalSlash(8, 20, last=16, near=12, block=16),
    "flexprefill": lambda: A.FlexPrefill(0.3, least=6, last=16, near=4, block=16),
    "seerattention": lambda: seer(density=0.3),
    "seerattention-threshold": lambda: seer(threshold=0.2),
    "anchorattention": lambda: A.AnchorAttention(theta=0.5, step=2, block=16),
}
"""Methods that choose pairs of queries and keys; sparse at 100 tokens."""

GENEROUS = {
    "streamingllm": lambda: A.StreamingLLM(window=10**6),
    "blocksparse": lambda: A.BlockSparse(blocks=10**6),
    "verticalslash": lambda: A.VerticalSlash(10**6, 10**6),
    "flexprefill": lambda: A.FlexPrefill(1.0, least=10**6),
    "seerattention": lambda: seer(density=1.0),
    "anchorattention": lambda: A.AnchorAttention(theta=1e30),
}
"""The same with budgets above any length, which keep every pair."""

PRUNERS = {x.card.name: x for x in methods(roles=("scorer", "solver")).values()}
"""Scorers and solvers; each is valid without arguments."""


def step_of(number, total, layers, masks=None, gradients=None, generator=None):
    """A step as the engine would hand it over."""
    return Step(
        number, total, {x.name: 0.1 for x in layers}, layers, masks or {},
        generator or torch.Generator(), lambda: gradients or {},
    )  # fmt: skip
