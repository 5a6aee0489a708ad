"""Statistics stream and merge; schedules pass through their ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import UsageError
from gossamer.core.schedule import Constant, Cosine, Cubic, Linear
from gossamer.core.stats import ColumnNorm, Hessian


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_streams_in_any_split_merge_to_the_same(sizes, seed):
    x = torch.randn(sum(sizes), 7, generator=torch.Generator().manual_seed(seed))
    for kind in (ColumnNorm(), Hessian(torch.float64)):
        whole = kind.finalize(kind.update(kind.init(7), x), "l")
        parts = [kind.update(kind.init(7), part) for part in x.split(sizes)]
        merged = parts[0]
        for part in parts[1:]:
            merged = kind.merge(part, merged)
        got = kind.finalize(merged, "l")
        assert got.count == whole.count == len(x)
        for name in ("norm", "hessian"):
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


def test_schedules():
    assert Constant(0.3)(0.7) == 0.3
    assert Linear(1.0, 0.2)(0.5) == pytest.approx(0.6)
    assert Cubic(1.0, 0.1)(0.0) == 1.0 and Cubic(1.0, 0.1)(1.0) == pytest.approx(0.1)
    assert Cubic(1.0, 0.1)(0.5) == pytest.approx(0.1 + 0.9 / 8)
    assert Cosine(0.3)(0.5) == pytest.approx(0.15) and Cosine(0.3)(1.0) == pytest.approx(0)
    assert Cosine(0.3)(0.25) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    with pytest.raises(UsageError, match="progress"):
        Linear(0, 1)(1.01)
