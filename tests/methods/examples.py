"""One small valid instance per method, for every test that goes through all methods.

A new topology method enters here, by its card's name. `coupled` are sets of channels of the model
at hand; supports are updated every `every` steps. Variants follow a dash.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import dense_layers
import torch

import gossamer as gs
from gossamer.core.step import Step
from gossamer.methods import methods
from gossamer.methods.attention.adjacency import both_ways, layout_of
from gossamer.methods.attention.moa_plan import Plan
from gossamer.nn.attention_gate import BlockGate
from gossamer.ops.attention import Layout


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


def moa(*rules):
    """With a plan for one layer of 2 heads of keys."""
    return A.MoA(plan=Plan(16, (rules,)))


WITHOUT_SINKS = ("seer", "moa", "s2", "graphkv")
"""Methods that need not keep the first key, by the start of their names."""
BY_HEADS_OF_KEYS = ("seer", "moa", "s2")
"""Methods that go by the number of heads of keys, by the start of their names."""

ATTENTION = {
    "streamingllm": lambda: A.StreamingLLM(window=40, block=16),
    "blocksparse": lambda: A.BlockSparse(blocks=3),
    "blocksparse-density": lambda: A.BlockSparse(block=8, density=0.4),
    "verticalslash": lambda: A.VerticalSlash(8, 20, last=16, near=12, block=16),
    "flexprefill": lambda: A.FlexPrefill(0.3, least=6, last=16, near=4, block=16),
    "seerattention": lambda: seer(density=0.3),
    "seerattention-threshold": lambda: seer(threshold=0.2),
    "anchorattention": lambda: A.AnchorAttention(theta=0.5, step=2, block=16),
    "moa": lambda: moa((-32, 0.5), (16, 0.25)),
    "graphkv": lambda: A.GraphKV(5, (20, 13), (30, 17), edges=((0, 0), (0, 1), (1, 1))),
    "s2attention": lambda: A.S2Attention(local=2, stride=2, block=8),
    "s2attention-hybrid": lambda: A.S2Attention(2, 4, 8, offset=1, dense_heads=1, dense_every=2),
}
"""Methods that choose pairs of queries and keys; sparse at 100 tokens."""

CACHES = {
    "snapkv": lambda **options: A.SnapKV(**evicting(options)),
    "adasnapkv": lambda **options: A.AdaSnapKV(**evicting(options)),
    "quest": lambda **options: A.Quest(**{"page": 4, "tokens": 20} | options),
    "doublesparsity": lambda **options: labelled(**options),
    "mustafar": lambda **options: A.Mustafar(**{"tail": 8, "every": 64} | options),
}
"""Methods that keep or read a part of a cache, for 2 heads of keys of width 16."""


def evicting(options):
    return {"tokens": 20, "last": 16, "sinks": 2, "window": 6, "kernel": 5} | options


def labelled(**options):
    """With random channels for 4 layers of 2 heads of keys of width 16."""
    generator = torch.Generator().manual_seed(0)
    channels = {i: torch.rand(2, 16, generator=generator).argsort(-1)[:, :4] for i in range(4)}
    return A.DoubleSparsity(**{"tokens": 20, "dense": 0, "channels": channels} | options)


GENEROUS = {
    "streamingllm": lambda: A.StreamingLLM(window=10**6),
    "blocksparse": lambda: A.BlockSparse(blocks=10**6),
    "verticalslash": lambda: A.VerticalSlash(10**6, 10**6),
    "flexprefill": lambda: A.FlexPrefill(1.0, least=10**6),
    "seerattention": lambda: seer(density=1.0),
    "anchorattention": lambda: A.AnchorAttention(theta=1e30),
    "moa": lambda: moa((10**6, 1.0), (10**6, 1.0)),
    "graphkv": lambda: A.GraphKV(),
    "s2attention": lambda: A.S2Attention(local=10**6, stride=1),
}
"""The same with budgets above any length, which keep every pair."""


@dataclass(frozen=True)
class Layer:
    """make(): the layer, sparse on its inputs; full(): the same with a budget that keeps all.

    inputs(generator): a batch of float32 and whatever else the layer takes. shape(*inputs): of the
    output. masked(layer, *inputs): the output by dense maps under the layer's own choice; dense:
    without any choice. bad: each makes inputs that are refused, from good ones; refused: options.
    silent: how names of parameters begin that the output gives no gradient. batched: whether the
    first axis of the inputs is a batch of independent ones. generous(*inputs): the inputs that give
    a full budget, where it is not the layer that has it.
    """

    make: Callable
    full: Callable
    inputs: Callable
    shape: Callable
    masked: Callable
    dense: Callable
    bad: tuple = ()
    refused: tuple = ()
    silent: tuple = ()
    batched: bool = True
    generous: Callable = lambda *inputs: inputs


def normal(*shape):
    """A function that draws one such tensor."""
    return lambda generator: (torch.randn(*shape, generator=generator),)


def ring(generator):
    """A batch of fields on a ring of 10 nodes, with an eleventh that has no edge."""
    node = torch.arange(10)
    edges = both_ways(torch.stack([node, (node + 1) % 10]))
    return torch.randn(2, 11, 5, generator=generator), layout_of(edges, 11)


def two_frames(generator):
    """Appearances of 5 and 6 detections, of which the last has no pair."""
    pairs = (torch.rand(5, 5, generator=generator) < 0.5).nonzero().t()
    shapes = ((5, 8), (6, 8), (pairs.shape[1], 6))
    return *(torch.randn(*shape, generator=generator) for shape in shapes), pairs


def every_pair(previous, current, relations, pairs):
    """The same relations, and those of all other pairs are 0."""
    whole = relations.new_zeros(len(previous), len(current), 6)
    whole[pairs[0], pairs[1]] = relations
    return previous, current, whole.flatten(0, 1), torch.ones(whole.shape[:2]).nonzero().t()


def complete(nodes):
    """Every pair, a node with itself included."""
    return Layout.from_mask(torch.ones(nodes, nodes, dtype=torch.bool))


def documents(generator):
    """Queries, sentences, and which of them are no padding."""
    query, sentences = (
        torch.randn(3, 8, generator=generator),
        torch.randn(3, 7, 8, generator=generator),
    )
    return query, sentences, torch.arange(7) < torch.tensor([[7], [4], [2]])


def dma(keys):
    """With slopes that differ from head to head."""
    layer = A.DMA(16, 4, kv_heads=2, keys=keys)
    with torch.no_grad():
        layer.slope.copy_(torch.tensor([1.5, -1.0]))
    return layer


def gin(**options):
    """One that corrects something."""
    layer = A.SparseGIN(8, 6, **options)
    with torch.no_grad():
        layer.scale.fill_(0.5)
        layer.epsilon.fill_(0.3)
    return layer


LAYERS = {
    "biformer": Layer(
        make=lambda: A.BiFormer(8, 2, regions=3, routes=2, local=3),
        full=lambda: A.BiFormer(8, 2, regions=3, routes=9, local=3),
        inputs=normal(2, 8, 7, 9),
        shape=lambda x: x.shape,
        masked=dense_layers.biformer,
        dense=partial(dense_layers.biformer, whole=True),
        bad=(lambda x: (x[0],), lambda x: (x[:, :7],), lambda x: (x[:, :, :0],)),
        refused=(
            {"channels": 8, "heads": 3}, {"channels": 8, "regions": 0}, {"channels": 8, "routes": 0},
            {"channels": 8, "local": 4},
        ),
    ),
    "dma": Layer(
        make=lambda: dma(5),
        full=lambda: dma(100),
        inputs=normal(2, 21, 16),
        shape=lambda x: x.shape,
        masked=dense_layers.dma,
        dense=dense_layers.dma_dense,
        bad=(lambda x: (x[0],), lambda x: (x[:, :, :15],), lambda x: (x[:, :0],)),
        refused=(
            {"channels": 16, "heads": 3}, {"channels": 16, "heads": 4, "kv_heads": 3},
            {"channels": 16, "heads": 4, "keys": 0}, {"channels": 12, "heads": 4},
        ),
    ),
    "routingtransformer": Layer(
        make=lambda: A.RoutingTransformer(16, 4, clusters=3, window=6),
        full=lambda: A.RoutingTransformer(16, 4, clusters=3, window=100),
        inputs=normal(2, 21, 16),
        shape=lambda x: x.shape,
        masked=dense_layers.routing,
        dense=lambda layer, x: dense_layers.routing(layer, x, everything=True),
        bad=(lambda x: (x[0],), lambda x: (x[:, :, :15],), lambda x: (x[:, :0],)),
        refused=(
            {"channels": 16, "heads": 3, "clusters": 2, "window": 4},
            {"channels": 16, "heads": 4, "clusters": 0, "window": 4},
            {"channels": 16, "heads": 4, "clusters": 2, "window": 4, "local": 4},
            {"channels": 16, "heads": 4, "clusters": 2, "window": 4, "decay": 1.5},
        ),
    ),
    "routingtransformer-whole": Layer(
        make=lambda: A.RoutingTransformer(16, 4, clusters=3, window=6, local=1, whole=True),
        full=lambda: A.RoutingTransformer(16, 4, clusters=3, window=100, local=1, whole=True),
        inputs=normal(2, 21, 16),
        shape=lambda x: x.shape,
        masked=dense_layers.routing,
        dense=lambda layer, x: dense_layers.routing(layer, x, everything=True),
    ),
    "sparsegin": Layer(
        make=gin,
        full=lambda: gin(cut=0.0),
        inputs=lambda generator: (
            torch.randn(2, 9, 8, generator=generator),
            (2 * torch.randn(2, 3, 9, 9, generator=generator)).softmax(-1),
        ),
        shape=lambda x, attention: x.shape,
        masked=dense_layers.sparsegin,
        dense=lambda layer, *x: dense_layers.sparsegin(layer, *x, cut=0.0),
        bad=(
            lambda x, a: (x[0], a), lambda x, a: (x[:, :, :7], a), lambda x, a: (x, a[:, 0]),
            lambda x, a: (x, a[:, :, :8]), lambda x, a: (x, a[:1]),
        ),
        refused=(
            {"channels": 0, "hidden": 4}, {"channels": 4, "hidden": 0},
            {"channels": 4, "hidden": 4, "cut": -1}, {"channels": 4, "hidden": 4, "threshold": "a"},
        ),
    ),
    "drsformer": Layer(
        make=lambda: A.DRSformer(12, 2),
        full=lambda: A.DRSformer(12, 2, shares=(1.0,) * 4),
        inputs=normal(2, 12, 5, 6),
        shape=lambda x: x.shape,
        masked=dense_layers.drsformer,
        dense=dense_layers.restormer,
        bad=(lambda x: (x[0],), lambda x: (x[:, :11],)),
        refused=(
            {"channels": 12, "heads": 5}, {"channels": 0}, {"channels": 4, "heads": 4},
            {"channels": 12, "shares": ()}, {"channels": 12, "shares": (1.5,)},
        ),
    ),
    "gtsp": Layer(
        make=lambda: A.GTSP(8, 4, tokens=0.5, active=0.75),
        full=lambda: A.GTSP(8, 4),
        inputs=lambda generator: (
            torch.randn(3, 7, 8, generator=generator),
            torch.arange(7) < torch.tensor([[7], [4], [1]]),
        ),
        shape=lambda x, real: x.shape,
        masked=dense_layers.gtsp,
        dense=partial(dense_layers.gtsp, whole=True),
        bad=(
            lambda x, real: (x[..., :7], real), lambda x, real: (x[:, :0], real[:, :0]),
            lambda x, real: (x, real[:, :6]), lambda x, real: (x, real.float()),
        ),
        refused=(
            {"width": 8, "heads": 3}, {"width": 8, "tokens": 0.0}, {"width": 8, "active": 1.5},
            {"width": 8, "drop": -0.1},
        ),
    ),
    "meshtransformer": Layer(
        make=lambda: A.MeshTransformer(5, 2, width=8, layers=2, heads=2),
        full=lambda: A.MeshTransformer(5, 2, width=8, layers=2, heads=2),
        inputs=ring,
        generous=lambda x, edges: (x, complete(11)),
        shape=lambda x, edges: (*x.shape[:2], 2),
        masked=dense_layers.mesh_transformer,
        dense=partial(dense_layers.mesh_transformer, whole=True),
        bad=(
            lambda x, edges: (x[..., :4], edges), lambda x, edges: (x[0], edges),
            lambda x, edges: (x[:, :10], edges),
        ),
        refused=(
            {"features": 5, "outputs": 6}, {"features": 5, "outputs": 2, "heads": 3},
            {"features": 5, "outputs": 2, "layers": 0},
        ),
    ),
    "paraformer": Layer(
        make=lambda: A.Paraformer(8),
        full=lambda: A.Paraformer(8, weights="softmax"),
        inputs=documents,
        shape=lambda query, sentences, real: (len(query), 2),
        masked=dense_layers.paraformer,
        dense=partial(dense_layers.paraformer, whole=True),
        bad=(
            lambda query, sentences, real: (query[:2], sentences, real),
            lambda query, sentences, real: (query, sentences[..., :7], real),
            lambda query, sentences, real: (query, sentences, real[:, :6]),
            lambda query, sentences, real: (query, sentences, real.float()),
        ),
        refused=({"width": 0}, {"classes": 0}, {"weights": "entmax"}),
    ),
    "sparsegraphtracker": Layer(
        make=lambda: A.SparseGraphTracker(8, 4, 2),
        full=lambda: A.SparseGraphTracker(8, 4, 2),
        inputs=two_frames,
        generous=every_pair,
        shape=lambda previous, current, relations, pairs: (pairs.shape[1] + len(current),),
        masked=dense_layers.sparse_graph_tracker,
        dense=lambda layer, *inputs: dense_layers.sparse_graph_tracker(layer, *every_pair(*inputs)),
        bad=(
            lambda a, b, relations, pairs: (a[:, :7], b, relations, pairs),
            lambda a, b, relations, pairs: (a, b, relations[:, :5], pairs),
            lambda a, b, relations, pairs: (a, b, relations, pairs + 1),
            lambda a, b, relations, pairs: (a, b, relations, pairs.float()),
        ),
        refused=({"width": 0}, {"width": 8, "rounds": 0}, {"width": 8, "edge_width": 0}),
        batched=False,
    ),
    "sparsifiner": Layer(
        make=lambda: A.Sparsifiner(16, 13, 2),
        full=lambda: A.Sparsifiner(16, 13, 2, density=1.0),
        inputs=normal(2, 13, 16),
        shape=lambda x: x.shape,
        masked=dense_layers.sparsifiner,
        dense=partial(dense_layers.sparsifiner, whole=True),
        bad=(lambda x: (x[:, :12],), lambda x: (x[..., :15],), lambda x: (x[0],)),
        refused=(
            {"width": 16, "tokens": 13, "heads": 3}, {"width": 16, "tokens": 0, "heads": 2},
            {"width": 16, "tokens": 13, "heads": 2, "density": 0.0},
            {"width": 16, "tokens": 13, "heads": 2, "rank": 0},
        ),
        silent=("predictor", "compress", "basis"),
    ),
}  # fmt: skip
"""Methods that are modules, used directly."""

GRID = gs.TokenGrid(4, 6, 6, text=5)
"""149 tokens, for the methods below."""


def patterns(*modes):
    """A calibrated SparseVDiT of one pattern for each of 4 heads of one layer."""
    columns = torch.arange(10).expand(4, -1) < 3
    return A.SparseVDiT(block=16, modes={0: modes}, columns={0: columns})


STEPS = {
    "adaspa": lambda: A.AdaSpa(density=0.4, block=16, first=0.2, again=0.4),
    "adaspa-plain": lambda: A.AdaSpa(density=0.4, block=16, adaptive=False),
    "sparsevdit": lambda: patterns("diagonal", "frames", "columns", "dense"),
    "sparsevdit-skip": lambda: patterns("skip", "frames", "columns", "columns"),
    "svg2": lambda: A.SVG2(8, 12, share=0.5, layers=0, start=4, block=16),
    "rettention": lambda: A.Rettention(share=0.1, every=3, block=16),
    "sparsed": lambda: A.SparseD(share=0.3, block=16),
    "sparsed-prompt": lambda: A.SparseD(share=0.3, block=16, prompt=40),
    "psa": lambda: A.PSA(rows=16, block=16, tile=16),
    "videoblade": lambda: A.VideoBLADE(most=0.3, pool=5, block=16),
    "videoblade-disjoint": lambda: A.VideoBLADE(most=0.3, pool=4, block=16, disjoint=True),
    "lightforcing": lambda: A.LightForcing(0.4, 0.2, chunks=3, frames=1, block=16),
    "psa-mass": lambda: A.PSA("mass", (0.2, 0.4, 0.6, 0.8), 16, 16, 8, order="none"),
}
"""Methods that follow denoising steps; sparse at some of 10 steps of GRID."""

GENEROUS_STEPS = {
    "adaspa": lambda: A.AdaSpa(density=1.0),
    "sparsevdit": lambda: patterns(*["dense"] * 4),
    "svg2": lambda: A.SVG2(8, 12, share=1.0, least=1.0, layers=0, start=4),
    "rettention": lambda: A.Rettention(share=1.0, growth=0.0),
    "sparsed": lambda: A.SparseD(share=1.0),
    "psa": lambda: A.PSA(shares=(1.0, 1.0, 1.0, 1.0)),
    "videoblade": lambda: A.VideoBLADE(1.0, most=1.0, pool=16, disjoint=True),
    "lightforcing": lambda: A.LightForcing(1.0, 1.0, chunks=3, frames=99),
}
"""The same with budgets that keep every pair."""

PRUNERS = {x.card.name: x for x in methods(roles=("scorer", "solver")).values()}
"""Scorers and solvers; each is valid without arguments."""


def step_of(number, total, layers, masks=None, gradients=None, generator=None):
    """A step as the engine would hand it over."""
    return Step(
        number, total, {x.name: 0.1 for x in layers}, layers, masks or {},
        generator or torch.Generator(), lambda: gradients or {},
    )  # fmt: skip
