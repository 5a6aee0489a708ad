"""Quantiles of a stream are those of all numbers, whatever the order and the parts."""

import pytest
import torch

import gossamer as gs
from gossamer.core.quantiles import MagnitudeQuantiles, quantile

KIND = MagnitudeQuantiles()


def seen(*parts):
    state = KIND.init()
    for part in parts:
        state = KIND.update(state, part)
    return state


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantiles_are_exact_within_a_bucket(scale, dtype):
    x = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    for p in (0.1, 0.4, 0.5, 0.9, 0.999, 1.0):
        want = float(x.float().abs().double().quantile(p))
        assert quantile(seen(x), p) == pytest.approx(want, rel=1 / 128)


def test_streams_merge():
    parts = [torch.randn(300), torch.randn(7, 5) * 100, torch.zeros(40)]
    merged = KIND.merge(seen(parts[0]), seen(*parts[1:]))
    assert torch.equal(merged.counts, seen(*reversed(parts)).counts)
    assert merged.count == 375 and merged.zeros == pytest.approx(40 / 375)


def test_many_zeros_have_the_threshold_zero():
    assert quantile(seen(torch.cat([torch.zeros(60), torch.ones(40)])), 0.5) == 0.0


def test_bad_numbers_are_refused():
    with pytest.raises(gs.NonFiniteError, match="layer a"):
        KIND.update(KIND.init(), torch.tensor([1.0, float("nan")]), "layer a")
    with pytest.raises(gs.UsageError, match="of 0 numbers"):
        quantile(KIND.init(), 0.5)
