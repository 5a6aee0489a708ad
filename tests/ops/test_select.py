"""Selection is exact and deterministic, refuses what cannot be ranked, and hides no NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.core.density import kept_count
from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.pattern import NM, Block, Channel, Unstructured, format_pattern, parse_pattern
from gossamer.methods.weights import sdgf
from gossamer.ops import _dispatch
from gossamer.ops import select as ops
from gossamer.ops.select import keep, native, reference, select, select_global

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


def test_patterns_that_do_not_fit():
    with pytest.raises(PatternError, match="divisible by 4"):
        select(torch.zeros(4, 6), NM(2, 4), 0.5, name="q_proj")
    with pytest.raises(PatternError, match="contradicts"):
        select(torch.zeros(4, 8), NM(2, 4), 0.25)
    with pytest.raises(PatternError, match="N:M"):
        select_global({"a": torch.zeros(4, 8)}, NM(2, 4), 0.5)


@pytest.mark.parametrize("pattern", [NM(8, 64), NM(16, 64), NM(8, 256), NM(1, 9999)], ids=str)
def test_nm_masks_may_be_wider_than_what_kernels_store(pattern):
    scores = torch.rand(3, 2 * pattern.group)
    mask = select(scores, pattern, pattern.density).mask
    assert (mask.reshape(-1, pattern.group).sum(1) == pattern.keep).all()
    assert parse_pattern(format_pattern(pattern)) == pattern


def test_every_nm_pattern_up_to_32():
    for group in range(2, 33):
        for kept in range(1, group):
            scores = torch.randn(3, 2 * group)
            mask = select(scores, NM(kept, group), kept / group).mask
            assert (mask.reshape(-1, group).sum(1) == kept).all()


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
    expected = reference.top(joined, kept_count(joined.numel(), density))
    got = torch.cat([supports[name].mask.flatten() for name in scores])
    assert torch.equal(got, expected)


def test_global_channels_of_unequal_size_stay_within_one_unit():
    scores = {"wide": torch.rand(8, 64), "narrow": torch.rand(8, 16)}
    supports = select_global(scores, Channel(0), 0.5)
    kept = sum(s.count for s in supports.values())
    assert 320 - 64 < kept <= 320


@settings(max_examples=60, deadline=None)
@given(st.floats(0.02, 1.0), st.integers(0, 4), st.integers(0, 999))
def test_a_floor_keeps_the_highest_of_each_tensor_within_the_budget(density, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "large": torch.randint(0, 9, (6, 7), generator=generator).float() + 100,
        "small": torch.randint(0, 9, (3, 4), generator=generator).float(),
        "few": torch.randint(0, 9, (1, 2), generator=generator).float(),
    }
    supports = select_global(scores, Unstructured(), density, floor=floor)
    safe = {name: brute_top(s.flatten().tolist(), floor) for name, s in scores.items()}
    units = [(name, i) for name, s in scores.items() for i in range(s.numel())]
    rank = {
        (name, i): (i not in safe[name], -float(scores[name].flatten()[i]), place)
        for place, (name, i) in enumerate(units)
    }
    count = max(kept_count(len(units), density), sum(len(x) for x in safe.values()))
    expected = set(sorted(units, key=rank.__getitem__)[:count])
    kept = {
        (name, i)
        for name, s in supports.items()
        for i in s.mask.flatten().nonzero().flatten().tolist()
    }
    assert kept == expected


def test_a_floor_of_unequal_channels():
    scores = {"wide": torch.rand(8, 64) + 1, "narrow": torch.rand(8, 16)}
    kept = {n: s.count for n, s in select_global(scores, Channel(0), 0.5, floor=2).items()}
    assert kept["narrow"] == 2 * 16 and 320 - 64 < sum(kept.values()) <= 320
    kept = {n: s.count for n, s in select_global(scores, Channel(0), 0.01, floor=2).items()}
    assert kept == {"wide": 128, "narrow": 32}
    for floor in (-1, 1.5, True):
        with pytest.raises(UsageError, match="floor"):
            select_global(scores, Channel(0), 0.5, floor=floor)


@pytest.mark.parametrize("scope", ["row", "column"])
def test_a_global_ranking_has_no_other_scope(scope):
    scores = {"a": torch.randn(4, 6), "b": torch.randn(3, 5)}
    plain = select_global(scores, Unstructured(), 0.5)
    for name, support in select_global(scores, Unstructured(scope), 0.5).items():
        assert torch.equal(support.mask, plain[name].mask)


# The kernel.

needs_kernel = pytest.mark.skipif(_dispatch.kernels() is None, reason="the kernels are not built")


def scores_of(kind, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=generator)
    if kind == "ties":
        scores = (scores * 2).round()  # zeros of both signs among them
    if kind == "equal":
        scores = torch.full((rows, n), -0.0)
        scores[:, ::3] = 0.0
    if kind in ("infinite", "holes"):
        scores[torch.rand(rows, n, generator=generator) < 0.3] = torch.inf
        scores[torch.rand(rows, n, generator=generator) < 0.3] = -torch.inf
    if kind == "holes":
        scores[torch.rand(rows, n, generator=generator) < 0.2] = torch.nan
    if kind == "tiny":
        scores = scores * 1e-42
    return scores


@needs_kernel
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["random", "ties", "equal", "infinite", "tiny", "holes"]),
    st.integers(0, 40),
    st.sampled_from([1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 200, 1000]),
    st.integers(0, 99),
    st.booleans(),
    st.data(),
)
def test_kernel_and_reference_agree(kind, rows, n, seed, forced, data):
    k = data.draw(st.integers(-1, n + 1))
    scores = scores_of(kind, rows, n, seed)
    always = scores_of("random", rows, n, seed + 1) > 1 if forced else None
    plain = reference.top(scores, k, always)
    assert torch.equal(ops._top(scores, k, always), plain)
    if 0 < k < n and rows:
        mask = native.top(scores, k, always)
        assert mask is None or torch.equal(mask, plain)
        assert mask is not None or forced or bool(torch.isnan(scores).any())


@needs_kernel
def test_the_kernel_serves_by_itself(monkeypatch):
    """float32 and shorter on the CPU; a caller passes nothing for it."""
    served = []
    top = native.top
    monkeypatch.setattr(native, "top", lambda *parts: served.append(1) or top(*parts))
    scores = torch.randn(64, 96)
    for case in (scores, scores.half(), scores.bfloat16(), scores.t()):
        select(case, Unstructured("row"), 0.5)
        keep(case, gs.TopK(5))
    assert len(served) == 8
    layers = [LayerInfo("a", (64, 96), None, scores)]
    sdgf.largest(layers, NM(2, 4))
    assert len(served) == 9
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    for case in (scores, scores.double(), scores.int()):
        keep(case, gs.TopK(5))
    monkeypatch.delenv("GOSSAMER_ISA")
    for case in (scores.double(), scores.int()):
        keep(case, gs.TopK(5))
    assert len(served) == 9


@needs_kernel
@pytest.mark.parametrize("n", [4, 8, 100])
def test_what_the_kernel_does_not_serve_goes_to_torch(n):
    scores = torch.randn(50, n)
    holed = scores.clone()
    holed[7, 1] = torch.nan
    for case in (holed, scores.double(), scores.half().float().int(), scores.t()[:, :20]):
        k = case.shape[1] // 2
        assert torch.equal(ops._top(case, k), reference.top(case, k))


@needs_kernel
def test_threads_do_not_change_the_mask(over_threads):
    scores = (torch.randn(700, 300) * 3).round()
    for case, k in ((scores, 100), (scores.reshape(-1, 4), 2), (scores.reshape(1, -1), 5000)):
        for mask in over_threads(lambda case=case, k=k: ops._top(case, k)):
            assert torch.equal(mask, reference.top(case, k))


@needs_kernel
@pytest.mark.parametrize("pattern", PATTERNS, ids=format_pattern)
def test_selection_is_the_same_with_either(pattern, monkeypatch):
    scores, density = (torch.randn(64, 96) * 4).round(), density_of(pattern, 0.4)
    fast = select(scores, pattern, density)
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    assert torch.equal(select(scores, pattern, density).mask, fast.mask)
