"""Selection is exact, deterministic, and refuses what cannot be ranked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.pattern import (
    NM,
    Block,
    Channel,
    Unstructured,
    check_pattern,
    format_pattern,
    parse_pattern,
)
from gossamer.core.select import kept_count, select, select_global, top_mask

PATTERNS = [
    Unstructured(),
    Unstructured("row"),
    Unstructured("column"),
    NM(2, 4),
    NM(1, 8),
    Block(4, 1),
    Block(1, 8),
    Channel(0),
    Channel(1),
]


def density_of(pattern, density=0.5):
    return pattern.density if isinstance(pattern, NM) else density


def brute_top(row, k):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return set(order[:k])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
)
def test_select_equals_a_sort_with_ties_by_index(values, density):
    scores = torch.tensor(values, dtype=torch.float32)
    mask = select(scores, Unstructured(), density).mask
    kept = brute_top(values, kept_count(len(values), density))
    assert set(mask.nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("pattern", PATTERNS, ids=format_pattern)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_counts_are_exact_per_ranking(pattern, dtype):
    scores = (torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    density = density_of(pattern)
    mask = select(scores, pattern, density).mask
    assert mask.shape == scores.shape and mask.is_contiguous()
    match pattern:
        case NM():
            assert (mask.reshape(-1, pattern.group).sum(1) == pattern.keep).all()
        case Unstructured(scope="row"):
            assert (mask.sum(1) == 12).all()
        case Unstructured(scope="column"):
            assert (mask.sum(0) == 8).all()
        case Block():
            tiles = mask.reshape(16 // pattern.rows, pattern.rows, -1, pattern.cols)
            kept = tiles.sum(dim=(1, 3))
            assert ((kept == 0) | (kept == pattern.rows * pattern.cols)).all()
            assert mask.sum() == 16 * 24 // 2
        case Channel():
            per_unit = mask.sum(1 - pattern.dim)
            assert ((per_unit == 0) | (per_unit == mask.shape[1 - pattern.dim])).all()
            assert mask.sum() == 16 * 24 // 2
        case _:
            assert mask.sum() == 16 * 24 // 2


@pytest.mark.parametrize("pattern", PATTERNS, ids=format_pattern)
def test_selection_is_idempotent(pattern):
    scores = torch.rand(16, 24, generator=torch.Generator().manual_seed(1)) + 0.1
    density = density_of(pattern)
    mask = select(scores, pattern, density).mask
    again = select(torch.where(mask, scores, torch.zeros(())), pattern, density).mask
    assert torch.equal(mask, again)


def test_permuting_rows_and_columns_permutes_the_mask():
    scores = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    rows, cols = torch.randperm(12), torch.randperm(20)
    mask = select(scores, Unstructured(), 0.3).mask
    assert torch.equal(select(scores[rows][:, cols], Unstructured(), 0.3).mask, mask[rows][:, cols])


def test_kept_scores_dominate_removed_ones():
    scores = torch.randn(500, 300, generator=torch.Generator().manual_seed(3))
    mask = select(scores, Unstructured(), 0.37).mask
    assert scores[mask].min() >= scores[~mask].max()


def test_odd_shapes():
    assert select(torch.tensor(3.0), Unstructured(), 1.0).mask.item() is True
    assert select(torch.tensor(3.0), Unstructured(), 0.4).count == 0
    assert select(torch.empty(0, 4), Unstructured(), 0.5).mask.shape == (0, 4)
    assert select(torch.empty(0, 4), NM(2, 4), 0.5).density == 1.0
    constant = select(torch.zeros(4, 8), Unstructured("row"), 0.5).mask
    assert constant[:, :4].all() and not constant[:, 4:].any()
    base = torch.randn(24, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(
        select(base.t(), NM(2, 4), 0.5).mask, select(base.t().contiguous(), NM(2, 4), 0.5).mask
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores_name_the_tensor(bad):
    scores = torch.zeros(4, 4)
    scores[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"layers\.3\.up"):
        select(scores, Unstructured(), 0.5, name="layers.3.up")
    with pytest.raises(NonFiniteError, match="second"):
        select_global({"first": torch.zeros(2, 2), "second": scores}, Unstructured(), 0.5)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), True, "half"])
def test_bad_density(density):
    with pytest.raises(UsageError, match="density"):
        select(torch.zeros(4, 4), Unstructured(), density)


def test_bad_patterns():
    with pytest.raises(PatternError, match="divisible by 4"):
        select(torch.zeros(4, 6), NM(2, 4), 0.5, name="q_proj")
    with pytest.raises(PatternError, match="contradicts"):
        select(torch.zeros(4, 8), NM(2, 4), 0.25)
    with pytest.raises(PatternError, match="tile"):
        check_pattern(Block(3, 1), (4, 4), "fc")
    for keep, group in [(0, 4), (4, 4), (5, 4), (2, 10_000), (2.0, 4)]:
        with pytest.raises(PatternError):
            NM(keep, group)
    for text in ["3", "unstructured:diagonal", "block:0x4", "channel:2", "2:4:8", ""]:
        with pytest.raises(PatternError):
            parse_pattern(text)


@pytest.mark.parametrize(
    "pattern",
    [*PATTERNS, Unstructured("global"), Block(2, 2, "global"), Channel(1, "global")],
    ids=format_pattern,
)
def test_pattern_text_round_trip(pattern):
    assert parse_pattern(format_pattern(pattern)) == pattern


@pytest.mark.parametrize("pattern", [NM(8, 64), NM(16, 64), NM(8, 256), NM(1, 9999)], ids=str)
def test_nm_masks_may_be_wider_than_what_kernels_store(pattern):
    scores = torch.rand(3, 2 * pattern.group)
    mask = select(scores, pattern, pattern.density).mask
    assert (mask.reshape(-1, pattern.group).sum(1) == pattern.keep).all()
    assert parse_pattern(format_pattern(pattern)) == pattern


def test_every_nm_pattern_up_to_32():
    for group in range(2, 33):
        for keep in range(1, group):
            scores = torch.randn(3, 2 * group)
            mask = select(scores, NM(keep, group), keep / group).mask
            assert (mask.reshape(-1, group).sum(1) == keep).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_global_selection_equals_one_sort_of_everything(density, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"a": (5, 7), "b": (3, 4), "c": (1, 9)}.items()
    }
    supports = select_global(scores, Unstructured(), density)
    joined = torch.cat([s.flatten() for s in scores.values()])
    expected = top_mask(joined.reshape(1, -1), kept_count(joined.numel(), density)).flatten()
    got = torch.cat([supports[name].mask.flatten() for name in scores])
    assert torch.equal(got, expected)


def test_global_channels_of_unequal_size_stay_within_one_unit():
    scores = {"wide": torch.rand(8, 64), "narrow": torch.rand(8, 16)}
    supports = select_global(scores, Channel(0), 0.5)
    kept = sum(s.count for s in supports.values())
    assert 320 - 64 < kept <= 320


def test_support_removes_nan_and_checks_shape():
    support = select(torch.tensor([[1.0, 2.0]]), Unstructured(), 0.5)
    assert torch.equal(
        support.apply(torch.tensor([[float("nan"), 3.0]])), torch.tensor([[0.0, 3.0]])
    )
    with pytest.raises(UsageError, match="shape"):
        support.apply(torch.zeros(2, 2))
