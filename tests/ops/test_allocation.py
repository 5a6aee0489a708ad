"""Allocations meet the budget and follow their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.ops.allocation import ALLOCATIONS, lamp_scores

SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 128), (10, 64)]


def layers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    infos = []
    for index, shape in enumerate(SHAPES):
        weight = torch.randn(shape, generator=generator).flatten(1) * (index + 1)
        norm = torch.rand(weight.shape[1], generator=generator).mul(4).exp()
        infos.append(LayerInfo(f"l{index}", shape, index, weight, norm, 0.1 * index))
    return infos


@settings(max_examples=40, deadline=None)
# below 0.27 the global threshold empties a layer for some seeds, which is refused, rightly
@given(st.sampled_from(sorted(ALLOCATIONS)), st.floats(0.3, 0.85), st.integers(0, 9))
def test_the_budget_is_met(name, density, seed):
    infos = layers(seed)
    result = ALLOCATIONS[name]().allocate(infos, density)
    assert list(result) == [info.name for info in infos]
    assert all(0 < value <= 1 for value in result.values())
    total = sum(info.size for info in infos)
    assert abs(sum(result[i.name] * i.size for i in infos) - density * total) <= 1


def test_erk_fixes_what_would_exceed_one_and_scales_the_rest():
    infos = layers()
    result = gs.ERK().allocate(infos, 0.3)
    raw = [sum(s) / torch.tensor(s).prod().item() for s in SHAPES]
    free = [i for i in range(4) if result[f"l{i}"] < 1]
    scale = {round(result[f"l{i}"] / raw[i], 6) for i in free}
    assert len(scale) == 1 and 0 < len(free) < 4
    assert all(scale.pop() * raw[i] > 1 - 1e-6 for i in range(4) if i not in free) or free
    assert gs.ER().allocate(infos[2:], 0.3) == gs.ERK().allocate(infos[2:], 0.3)


def test_uniform_plus():
    result = gs.UniformPlus().allocate(layers(), 0.15)
    assert result["l0"] == 1.0 and result["l3"] == 0.2 and result["l1"] == result["l2"]
    with pytest.raises(gs.UsageError, match="too low"):
        gs.UniformPlus().allocate(layers(), 0.005)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.15, 0.95), st.integers(0, 5))
def test_uniform_plus_never_breaks_its_floor(density, seed):
    result = gs.UniformPlus().allocate(layers(seed), density)
    assert result["l0"] == 1.0 and result["l3"] >= 0.2


@pytest.mark.parametrize("last", [1.0, 0.4])
def test_erk_plus_forces_the_last_layer_and_spreads_the_rest_by_erk(last):
    infos = layers()
    result = gs.ERKPlus(last).allocate(infos, 0.3)
    assert result["l3"] == last
    total = sum(info.size for info in infos)
    others = infos[:-1]
    left = 0.3 * total - last * infos[-1].size
    want = gs.ERK().allocate(others, left / sum(info.size for info in others))
    assert {k: result[k] for k in want} == pytest.approx(want)
    assert gs.ERKPlus().allocate(infos[:1], 0.3) == {"l0": 0.3}


def test_erk_plus_refuses_a_budget_that_it_cannot_meet():
    with pytest.raises(gs.UsageError, match="too low"):
        gs.ERKPlus().allocate(layers(), 0.001)
    with pytest.raises(gs.UsageError, match=r"last layer at 0\.1"):
        gs.ERKPlus(0.1).allocate(layers(), 0.99)
    with pytest.raises(gs.UsageError, match="density"):
        gs.ERKPlus(0.0)


def test_lamp_by_its_definition():
    weight = torch.tensor([[3.0, -1.0], [2.0, 2.0]])
    squares = [9.0, 1.0, 4.0, 4.0]
    ranked = sorted(range(4), key=lambda i: (squares[i], i))
    expected = [0.0] * 4
    for place, i in enumerate(ranked):
        expected[i] = squares[i] / sum(squares[j] for j in ranked[place:])
    torch.testing.assert_close(lamp_scores(weight).flatten(), torch.tensor(expected).double())
    assert lamp_scores(weight).max() == 1.0


def test_global_is_one_threshold():
    infos = layers()
    result = gs.Global().allocate(infos, 0.4)
    joined = torch.cat([i.weight.abs().flatten() for i in infos])
    threshold = joined.sort(descending=True).values[round(0.4 * len(joined)) - 1]
    for info in infos:
        share = (info.weight.abs() >= threshold).float().mean().item()
        assert result[info.name] == pytest.approx(share, abs=2 / info.size)


def test_owl_keeps_more_where_outliers_are():
    quiet = LayerInfo("q", (64, 64), 0, torch.ones(64, 64), torch.ones(64))
    norm = torch.ones(64)
    norm[:2] = 100.0
    loud = LayerInfo("o", (64, 64), 1, torch.ones(64, 64), norm)
    result = gs.OWL().allocate([quiet, loud], 0.3)
    assert gs.OWL().outlier_share([loud]) == 2 / 64 and gs.OWL().outlier_share([quiet]) == 0
    assert result["o"] == pytest.approx(0.38) and result["q"] == pytest.approx(0.22)
    assert gs.OWL().allocate([quiet], 0.3) == {"q": 0.3}
    with pytest.raises(gs.UsageError, match="norms"):
        gs.OWL().allocate([LayerInfo("x", (2, 2), 0, torch.ones(2, 2))], 0.5)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 0.99), st.floats(0.0, 0.5), st.integers(0, 99))
def test_owl_meets_the_budget_with_unequal_blocks_at_every_density(density, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    infos = [
        LayerInfo(
            str(k), (8 * (k + 1), 16), k, torch.randn(8 * (k + 1), 16, generator=generator) ** 3,
            torch.ones(16),
        )
        for k in range(4)
    ]  # fmt: skip
    result = gs.OWL(lam=lam).allocate(infos, density)
    kept = sum(result[info.name] * info.size for info in infos)
    assert kept == pytest.approx(density * sum(info.size for info in infos), rel=1e-9)
    assert all(density / 10 - 1e-12 <= value <= 1 for value in result.values())
    shares = {info.name: gs.OWL().outlier_share([info]) for info in infos}
    order = sorted(shares, key=lambda name: shares[name])
    assert [result[n] for n in order] == sorted(result[n] for n in order)


def block(index, size, angle):
    return LayerInfo(f"b{index}", (size, 512), index, torch.ones(size, 512), None, angle)


def released(sums, removed, a=1.0):
    """CFSP's released densities from sums of angles, but for its further factor of 1.05."""
    mean = sum(sums) / len(sums)
    raw = [1 / (1 + math.exp(-a * (x - mean) / 1e4)) for x in sums]
    average = sum(raw) / len(raw)
    if max(raw) / average * (1 - removed) >= 1:
        scale = average * (1 / (1 - removed) - 1) / (max(raw) - average)
        raw = [average + (x - average) * scale for x in raw]
    return [x / average * (1 - removed) for x in raw]


@pytest.mark.parametrize("removed", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
def test_block_influence_has_the_released_densities_at_the_released_count_of_tokens(removed, a):
    angles = [0.31, 0.12, 0.05, 0.06, 0.05, 0.22]
    infos = [block(index, 8, angle) for index, angle in enumerate(angles)]
    found = gs.BlockInfluence(a).allocate(infos, 1 - removed)
    want = released([x * 128 * 2048 for x in angles], removed, a)
    assert [found[f"b{index}"] for index in range(6)] == pytest.approx(want, rel=1e-9)
    assert (removed < 0.6 and max(found.values()) == 1.0) or max(found.values()) < 1.0


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 0.99), st.lists(st.floats(0, 0.4), min_size=2, max_size=5))
def test_block_influence_meets_the_budget_with_unequal_blocks_and_keeps_the_order(density, angles):
    infos = [block(index, 8 * (index + 1), angle) for index, angle in enumerate(angles)]
    outside = LayerInfo("head", (24, 16), None, torch.ones(24, 16))
    found = gs.BlockInfluence().allocate([*infos, outside], density)
    total = sum(x.size for x in infos)
    assert sum(found[x.name] * x.size for x in infos) == pytest.approx(density * total, rel=1e-9)
    assert found["head"] == density
    order = sorted(range(len(angles)), key=lambda k: angles[k])
    ranked = [found[f"b{k}"] for k in order]
    assert ranked == pytest.approx(sorted(ranked), rel=1e-9)


def test_block_influence_refuses_what_has_no_blocks_or_would_empty_one():
    with pytest.raises(gs.UsageError, match="with blocks"):
        gs.BlockInfluence().allocate([LayerInfo("x", (2, 2), None, torch.ones(2, 2))], 0.5)
    with pytest.raises(gs.UsageError, match=r"block 3: .*angle"):
        gs.BlockInfluence().allocate([block(3, 8, None)], 0.5)
    with pytest.raises(gs.UsageError, match="b0: would lose every weight"):
        gs.BlockInfluence(40.0).allocate([block(0, 8, 0.0), block(1, 8, 0.4)], 0.3)
    with pytest.raises(gs.UsageError, match="sharpness"):
        gs.BlockInfluence(float("nan"))
