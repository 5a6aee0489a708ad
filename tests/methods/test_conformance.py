"""Every method in the registry, under every pattern it admits."""

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from examples import (
    ATTENTION,
    CACHES,
    GENEROUS,
    GENEROUS_STEPS,
    INPUTS,
    LAYERS,
    LEARNED,
    PLANNERS,
    PRUNERS,
    RECIPES,
    REPLACERS,
    SOURCES,
    STEPS,
    TOPOLOGY,
)

import gossamer as gs
from gossamer.core.density import kept_count
from gossamer.core.stats import (
    ColumnNorm,
    ColumnSum,
    ColumnVariance,
    Hessian,
    LayerStats,
    together,
)
from gossamer.methods import TOPICS, cards, find, methods, summary, topic
from gossamer.methods.listing import listed
from gossamer.ops.select import select

CARDS = [x.card for x in PRUNERS.values()]

PATTERNS = {
    "unstructured": [gs.Unstructured(), gs.Unstructured("row"), gs.Unstructured("column")],
    "nm": [gs.NM(2, 4), gs.NM(1, 8)],
    "block": [gs.Block(4, 1), gs.Block(1, 8), gs.Block(2, 4)],
    "channel": [gs.Channel(1)],
}
REFUSED = {("dsnot", gs.Unstructured("column"))}
"""Scopes that a method refuses, as its own tests see."""
CASES = [
    (c.name, p)
    for c in CARDS
    for kind in c.patterns
    for p in PATTERNS[kind]
    if (c.name, p) not in REFUSED
]
IDS = [f"{name}-{gs.format_pattern(p)}" for name, p in CASES]


def stats_of(x, name="layer"):
    kinds = (ColumnNorm(), Hessian(torch.float64), ColumnSum(), ColumnVariance())
    parts = [kind.finalize(kind.update(kind.init(x.shape[1]), x), name) for kind in kinds]
    return replace(together(parts), sequences=1)


def problem(rows=24, cols=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(400, cols, generator=generator) @ (mix + torch.eye(cols))
    x = x * torch.rand(cols, generator=generator).mul(3).exp()
    return torch.randn(rows, cols, generator=generator), x


def apply(method, weight, stats, pattern, density):
    if hasattr(method, "solve"):
        return method.solve(weight, stats, pattern, density)
    support = select(method.score(weight, stats), pattern, density, stats.name)
    return support.apply(weight), support


@pytest.mark.parametrize(("name", "pattern"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_zeros_determinism_and_untouched_input(name, pattern, dtype):
    weight, x = problem()
    weight = weight.to(dtype)
    before, stats = weight.clone(), stats_of(x)
    density = pattern.density if isinstance(pattern, gs.NM) else 0.5
    pruned, support = apply(find(name)(), weight, stats, pattern, density)
    assert torch.equal(weight, before) and pruned.dtype == dtype
    assert support.count == kept_count(weight.numel(), density)
    assert not pruned[~support.mask].any()
    if isinstance(pattern, gs.NM):
        assert (support.mask.reshape(-1, pattern.group).sum(1) == pattern.keep).all()
    again, same = apply(find(name)(), weight, stats, pattern, density)
    assert torch.equal(pruned, again) and torch.equal(support.mask, same.mask)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("density", [0.1, 0.33, 0.77, 1.0])
def test_exact_counts_at_awkward_densities(name, density):
    weight, x = problem(13, 37, seed=1)
    _, support = apply(find(name)(), weight, stats_of(x), gs.Unstructured(), density)
    assert support.count == kept_count(13 * 37, density)


@pytest.mark.parametrize(
    "name", [c.name for c in CARDS if c.role == "scorer" and c.name != "random"]
)
def test_scores_follow_a_permutation_of_rows_and_columns(name):
    weight, x = problem()
    rows, cols = torch.randperm(24), torch.randperm(48)
    plain = find(name)().score(weight, stats_of(x))
    turned = find(name)().score(weight[rows][:, cols], stats_of(x[:, cols]))
    torch.testing.assert_close(turned, plain[rows][:, cols])


def test_error_on_correlated_inputs_orders_the_methods():
    losses = dict.fromkeys(PRUNERS, 0.0)
    for seed in range(3):
        weight, x = problem(64, 96, seed)
        for name in PRUNERS:
            method = find(name)()
            pruned, _ = apply(method, weight, stats_of(x), method.default_pattern, 0.5)
            losses[name] += float((x @ (pruned - weight).t()).square().sum())
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"] < losses["random"]


def test_wanda_masks_equal_a_sort_of_each_row():
    weight, x = problem(40, 64, seed=5)
    mask = select(
        gs.weights.Wanda().score(weight, stats_of(x)), gs.weights.Wanda().default_pattern, 0.5
    ).mask
    norm = x.double().square().sum(0).sqrt().float()
    for row in range(40):
        order = sorted(range(64), key=lambda j: (-float(weight[row, j].abs() * norm[j]), j))
        assert set(mask[row].nonzero().flatten().tolist()) == set(order[:32])


def test_random_depends_on_seed_and_name_only():
    weight, _ = problem()
    one, other = LayerStats("a", 0), LayerStats("b", 0)
    assert torch.equal(
        gs.weights.Random(1).score(weight, one), gs.weights.Random(1).score(weight * 2, one)
    )
    assert not torch.equal(
        gs.weights.Random(1).score(weight, one), gs.weights.Random(1).score(weight, other)
    )
    assert not torch.equal(
        gs.weights.Random(1).score(weight, one), gs.weights.Random(2).score(weight, one)
    )


def test_missing_statistics_and_bad_weights_name_the_layer():
    weight, x = problem()
    for method in (gs.weights.Wanda(), gs.weights.SparseGPT()):
        with pytest.raises(gs.UsageError, match=r"h\.0\.fc"):
            apply(method, weight, LayerStats("h.0.fc", 0), gs.Unstructured(), 0.5)
    weight[0, 0] = float("nan")
    for name in ("magnitude", "wanda", "sparsegpt"):
        with pytest.raises(gs.NonFiniteError, match=r"h\.0\.fc"):
            apply(find(name)(), weight, stats_of(x, "h.0.fc"), gs.Unstructured(), 0.5)
    with pytest.raises(gs.PatternError, match="row"):
        gs.weights.SparseGPT().solve(torch.ones(24, 48), stats_of(x), gs.Channel(0), 0.5)


ROLES = {
    "scorer", "solver", "topology", "learned_mask", "replacer", "planner", "gradient_source",
    "recipe", "key_scorer", "layer",
    "step_attention", "cache",
    "input_scorer", "neuron_selector", "corrector",
}  # fmt: skip
PATTERN_WORDS = {"unstructured", "nm", "block", "channel"}


@pytest.mark.parametrize("name", methods())
def test_cards_hold_facts_and_modules_tell_the_rest(name):
    method = methods()[name]
    card = method.card
    assert find(name) is method and getattr(topic(card.topic), method.__name__) is method
    assert card.role in ROLES and set(card.patterns) <= PATTERN_WORDS and card.patterns
    known = {"norm", "hessian", "sum", "variance", "gradients", "loss", "inputs"}
    assert set(card.needs) <= known
    assert card.link.startswith("https://arxiv.org/") and 1990 < card.year < 2030
    text = sys.modules[method.__module__].__doc__
    assert ": " in summary(method) and len(summary(method)) <= 100
    assert all(f"**{word}.**" in text for word in ("Paper", "Claim", "Notes"))


def test_topics_are_ten_and_their_registries_name_each_method_once():
    assert len(TOPICS) == 10 and {card.topic for card in cards()} <= set(TOPICS)
    for name in TOPICS:
        if (module := topic(name)) is not None:
            assert len(set(module.__all__)) == len(module.__all__) > 0
    assert topic("attention") is None or cards("attention")
    assert topic("no such") is None


def test_names_are_found_near_ones_are_told_and_shared_ones_need_their_topic(monkeypatch):
    with pytest.raises(gs.UsageError, match="did you mean 'wanda'"):
        find("wonda")
    assert find("Weights.Random") is gs.weights.Random
    both = methods() | {"graphs.random": gs.weights.Magnitude}
    monkeypatch.setattr("gossamer.methods.methods", lambda: both)
    with pytest.raises(gs.UsageError, match=r"write weights\.random or graphs\.random"):
        find("random")
    assert find("graphs.random") is gs.weights.Magnitude and find("wanda") is gs.weights.Wanda


@pytest.mark.parametrize(
    ("role", "examples"),
    [
        ("topology", TOPOLOGY),
        ("learned_mask", LEARNED),
        ("replacer", REPLACERS),
        ("planner", PLANNERS),
        ("gradient_source", SOURCES),
        ("recipe", RECIPES),
        ("key_scorer", ATTENTION),
        ("input_scorer", INPUTS),
        ("key_scorer", GENEROUS),
        ("cache", CACHES),
        ("layer", LAYERS),
        ("step_attention", STEPS),
        ("step_attention", GENEROUS_STEPS),
    ],
)
def test_every_method_has_an_example(role, examples):
    names = {card.name for card in cards() if card.role == role}
    assert names == {name.partition("-")[0] for name in examples}


def test_the_listing_without_torch_is_the_registry():
    for name in TOPICS:
        found = {f"{x.card.topic}.{x.card.name}": x for x in listed(name)}
        assert list(found) == list(methods(name))
        for key, x in found.items():
            method = methods()[key]
            assert (x.card, x.name) == (method.card, method.__name__)
            assert x.text == inspect.cleandoc(sys.modules[method.__module__].__doc__)
    code = (
        "import sys; from gossamer.cli import main; main(['methods']); main(['methods', 'weights']);"
        "main(['methods', 'wanda']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
