"""Patterns and supports are checked data, and patterns survive being written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import PatternError, UsageError
from gossamer.core.pattern import (
    NM,
    Block,
    Channel,
    Unstructured,
    check_pattern,
    format_pattern,
    parse_pattern,
)
from gossamer.core.support import Support
from gossamer.core.units import expand_units, unit_scores

PATTERNS = [
    Unstructured(),
    Unstructured("row"),
    Unstructured("column"),
    NM(2, 4),
    NM(1, 8),
    Block(4, 1),
    Block(2, 8),
    Channel(0),
    Channel(1),
]


@pytest.mark.parametrize(
    "pattern",
    [*PATTERNS, Unstructured("global"), Block(2, 2, "global"), Channel(1, "global")],
    ids=format_pattern,
)
def test_pattern_text_round_trip(pattern):
    assert parse_pattern(format_pattern(pattern)) == pattern


def test_bad_patterns():
    with pytest.raises(PatternError, match="tile"):
        check_pattern(Block(3, 1), (4, 4), "fc")
    for keep, group in [(0, 4), (4, 4), (5, 4), (2, 10_000), (2.0, 4)]:
        with pytest.raises(PatternError):
            NM(keep, group)
    for text in ["3", "unstructured:diagonal", "block:0x4", "channel:2", "2:4:8", ""]:
        with pytest.raises(PatternError):
            parse_pattern(text)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(0, 99))
def test_units_sum_their_weights_and_expand_to_them(pattern, seed):
    """Whatever units are kept: scores over their weights are those of the units."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (8, 24), generator=generator)
    units = unit_scores(scores, pattern)
    kept = torch.rand(units.shape, generator=generator) < 0.5
    mask = expand_units(kept, scores.shape, pattern)
    assert mask.shape == scores.shape and mask.dtype == torch.bool and mask.is_contiguous()
    assert int(scores[mask].sum()) == int(units[kept].sum())
    assert torch.equal(unit_scores(mask.int(), pattern) > 0, kept)


def test_support_removes_nan_and_checks_shape():
    support = Support(torch.tensor([[False, True]]), Unstructured(), 0.5)
    assert torch.equal(
        support.apply(torch.tensor([[float("nan"), 3.0]])), torch.tensor([[0.0, 3.0]])
    )
    with pytest.raises(UsageError, match="shape"):
        support.apply(torch.zeros(2, 2))
