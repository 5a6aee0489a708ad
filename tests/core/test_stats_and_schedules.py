"""Statistics stream and merge; schedules pass through their ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import UsageError
from gossamer.core.schedule import Constant, Cosine, Cubic, Linear
from gossamer.core.stats import (
    AngularDistance,
    ColumnNorm,
    ColumnSum,
    ColumnVariance,
    Hessian,
    LayerStats,
    together,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_streams_in_any_split_merge_to_the_same(sizes, seed):
    x = torch.randn(sum(sizes), 7, generator=torch.Generator().manual_seed(seed))
    for kind in (ColumnNorm(), Hessian(torch.float64), ColumnSum(), ColumnVariance()):
        whole = kind.finalize(kind.update(kind.init(7), x), "l")
        parts = [kind.update(kind.init(7), part) for part in x.split(sizes)]
        merged = parts[0]
        for part in parts[1:]:
            merged = kind.merge(part, merged)
        got = kind.finalize(merged, "l")
        assert got.count == whole.count == len(x)
        for name in ("norm", "hessian", "sum", "variance"):
            if getattr(whole, name) is not None:
                torch.testing.assert_close(getattr(got, name), getattr(whole, name))


def test_definitions_and_bad_rows():
    x = torch.randn(50, 5)
    norm, hessian = ColumnNorm(), Hessian()
    torch.testing.assert_close(norm.finalize(norm.update(norm.init(5), x), "l").norm, x.norm(dim=0))
    got = hessian.finalize(hessian.update(hessian.init(5), x), "l").hessian
    torch.testing.assert_close(got, 2 / 50 * x.t() @ x)
    with pytest.raises(UsageError, match="5 inputs"):
        norm.update(norm.init(5), torch.zeros(3, 4))
    with pytest.raises(UsageError, match="merge"):
        norm.merge(norm.init(5), norm.init(4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_variances_of_unequal_shards_far_from_zero_keep_their_digits(sizes, seed):
    """A sum of squares has no digits left here: in float32 a mean of 3000 takes them all."""
    sizes[0] += 1
    generator = torch.Generator().manual_seed(seed)
    x = (3000.0 + 0.1 * torch.randn(sum(sizes), 5, generator=generator)).float()
    for kind, close in ((ColumnVariance(), 1e-6), (ColumnVariance(torch.float32), 1e-2)):
        parts = [kind.update(kind.init(5), part) for part in x.split(sizes)]
        for order in (parts, parts[::-1]):
            merged = kind.init(5)
            for part in order:
                merged = kind.merge(merged, part)
            got = kind.finalize(merged, "l")
            want = x.double().var(0, correction=0)
            torch.testing.assert_close(got.variance.double(), want, rtol=close, atol=1e-7)
    inside = sum(
        part.double().var(0, correction=0) * len(part) for part in x.split(sizes) if len(part)
    )
    got = ColumnVariance()
    state = got.init(5)
    for part in x.split(sizes):
        state = got.update(state, part)
    within = got.finalize(state, "l").within.double()
    torch.testing.assert_close(within, inside / len(x), rtol=1e-6, atol=1e-9)


def test_sums_are_signed_and_parts_of_one_layer_join():
    x = torch.tensor([[1.0, -2.0], [3.0, 2.0], [-5.0, 1e-8]])
    kinds = (ColumnSum(), ColumnVariance(), ColumnNorm())
    parts = [kind.finalize(kind.update(kind.init(2), x), "l") for kind in kinds]
    assert parts[0].sum.tolist() == pytest.approx([-1.0, 1e-8])
    joined = together(parts)
    assert joined.count == 3 and joined.hessian is None and joined.sequences == 0
    for name, part in zip(("sum", "variance", "norm"), parts):
        assert getattr(joined, name) is getattr(part, name)
    with pytest.raises(UsageError, match="different inputs"):
        together([parts[0], LayerStats("l", 4)])
    with pytest.raises(UsageError, match="merge"):
        ColumnVariance().merge(ColumnVariance().init(5), ColumnVariance().init(4))


def test_angles_are_exact_where_a_cosine_has_no_digits():
    kind = AngularDistance()
    turns = torch.tensor([0.0, 1e-6, 0.25, 0.5, 1.0], dtype=torch.float64)
    before = torch.zeros(5, 3, dtype=torch.float64)
    before[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    after = (
        torch.stack(((turns * math.pi).cos(), (turns * math.pi).sin(), torch.zeros(5)), dim=1)
        * torch.tensor([7.0, 1.0, 0.5, 2.0, 9.0])[:, None]
    )
    for row in range(5):
        state = kind.update(kind.init(), before[row : row + 1], after[row : row + 1])
        assert kind.finalize(state, "b").angle == pytest.approx(float(turns[row]), rel=1e-7)
    whole = kind.update(kind.init(), before, after)
    parts = [kind.update(kind.init(), *pair) for pair in zip(before.split(2), after.split(2))]
    merged = kind.merge(kind.merge(parts[2], parts[0]), parts[1])
    assert kind.finalize(merged, "b").angle == pytest.approx(kind.finalize(whole, "b").angle)
    blank = kind.update(whole, torch.zeros(2, 3), torch.ones(2, 3))
    assert blank == whole and kind.finalize(kind.init(), "b").count == 0
    with pytest.raises(UsageError, match="one width"):
        kind.update(whole, torch.ones(2, 3), torch.ones(2, 4))


def test_schedules():
    assert Constant(0.3)(0.7) == 0.3
    assert Linear(1.0, 0.2)(0.5) == pytest.approx(0.6)
    assert Cubic(1.0, 0.1)(0.0) == 1.0 and Cubic(1.0, 0.1)(1.0) == pytest.approx(0.1)
    assert Cubic(1.0, 0.1)(0.5) == pytest.approx(0.1 + 0.9 / 8)
    assert Cosine(0.3)(0.5) == pytest.approx(0.15) and Cosine(0.3)(1.0) == pytest.approx(0)
    assert Cosine(0.3)(0.25) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    with pytest.raises(UsageError, match="progress"):
        Linear(0, 1)(1.01)
