"""Student's t against scipy, and what an interval promises."""

import numpy as np
import pytest
from scipy import stats

from gossamer.core.confidence import interval, t_cdf, t_quantile
from gossamer.core.errors import UsageError


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 19, 30, 100, 1000, 2.5, 1e6])
def test_quantiles_are_those_of_scipy(freedom):
    for probability in (0.01, 0.4, 0.5, 0.6, 0.9, 0.975, 0.9917, 0.9999):
        expected = stats.t.ppf(probability, freedom)
        assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_distribution_is_that_of_scipy():
    for freedom in (1, 4, 40):
        for t in (-30.0, -1.5, 0.0, 0.2, 2.0, 50.0):
            assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-10)


def test_interval_is_that_of_scipy():
    values = [0.3, 0.1, 0.7, 0.35]
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    mean, half = interval(values, 0.9)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_what_has_no_interval_is_refused():
    with pytest.raises(UsageError, match="at least 2"):
        interval([1.0])
    with pytest.raises(UsageError, match="degrees of freedom"):
        t_quantile(0.9, 0)
