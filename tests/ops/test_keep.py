"""What is kept per input equals its definition under every budget, on every path."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.core.density import kept_count
from gossamer.core.errors import UsageError
from gossamer.ops.select import keep


def chosen(row, budget, always):
    """`keep` for one row, in plain Python."""
    top = lambda i: (i not in always, not math.isnan(row[i]), -row[i], i)  # noqa: E731
    order = sorted(range(len(row)), key=top)
    if isinstance(budget, gs.Threshold):
        found = {i for i, score in enumerate(row) if score > budget.value or math.isnan(score)}
    elif isinstance(budget, gs.TopP):
        forced = always | {i for i, score in enumerate(row) if math.isnan(score)}
        mass = [0 if math.isnan(score) else max(0, score) for score in row]
        found, sum_so_far = set(forced), sum(mass[i] for i in forced)
        for i in sorted(range(len(row)), key=lambda i: (-mass[i], i)):
            if i not in forced and sum_so_far < budget.p * sum(mass):
                found.add(i)
                sum_so_far += mass[i]
    else:
        k = budget.k if isinstance(budget, gs.TopK) else kept_count(len(row), budget.fraction)
        found = set(order[:k])
    return {i for i in found if row[i] != -math.inf} | always


eighths = st.integers(1, 8).map(lambda x: x / 8)  # exact in binary, as sums of small numbers are
BUDGETS = st.one_of(
    st.integers(0, 12).map(gs.TopK),
    eighths.map(gs.TopP),
    st.integers(-4, 4).map(gs.Threshold),
    st.floats(0.01, 1.0).map(gs.Fraction),
)
NUMBERS = st.one_of(st.integers(-3, 4).map(float), st.sampled_from([math.nan, -math.inf]))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(max_examples=300, deadline=None)
@given(
    BUDGETS,
    st.integers(1, 10).flatmap(
        lambda n: st.lists(
            st.tuples(st.lists(NUMBERS, min_size=n, max_size=n), st.sets(st.integers(0, n - 1))),
            max_size=4,
        ).map(lambda rows: (n, rows))
    ),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_keep_is_its_definition(budget, case, forced, dtype):
    n, rows = case
    scores = torch.tensor([row for row, _ in rows]).reshape(len(rows), n).to(dtype)
    always = torch.tensor([[i in s for i in range(n)] for _, s in rows]).reshape(len(rows), n)
    mask = keep(scores, budget, always.bool() if forced else None)
    assert mask.shape == scores.shape and mask.dtype == torch.bool
    for found, (row, safe) in zip(mask, rows, strict=True):
        expected = chosen(row, budget, safe if forced else set())
        assert set(found.nonzero().flatten().tolist()) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 40).map(lambda x: gs.BatchTopK(x / 8)),
    st.lists(NUMBERS, min_size=12, max_size=12),
    st.sets(st.integers(0, 11)),
)
def test_a_budget_of_the_batch_is_one_ranking(budget, row, safe):
    scores = torch.tensor(row).reshape(2, 2, 3)
    always = torch.tensor([i in safe for i in range(12)]).reshape(2, 2, 3)
    mask = keep(scores, budget, always).flatten()
    expected = chosen(row, gs.TopK(math.floor(4 * budget.k)), safe)
    assert set(mask.nonzero().flatten().tolist()) == expected


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([torch.uint8, torch.int8, torch.int64, torch.bool]), BUDGETS,
       st.lists(st.integers(0, 255), min_size=1, max_size=9), st.sets(st.integers(0, 8)))  # fmt: skip
def test_keep_ranks_whole_numbers(dtype, budget, values, safe):
    scores = torch.tensor(values).to(dtype)
    safe = {i for i in safe if i < len(values)}
    always = torch.tensor([i in safe for i in range(len(values))])
    expected = chosen([float(x) for x in scores.tolist()], budget, safe)
    assert set(keep(scores, budget, always).nonzero().flatten().tolist()) == expected


def test_counts_hold_with_infinite_scores_beside_forced_ones():
    scores = torch.tensor([math.inf, math.inf, 1.0, 2.0])
    always = torch.tensor([False, False, False, True])
    assert keep(scores, gs.TopK(2), always).tolist() == [True, False, False, True]


def test_long_rows_by_kernel_and_by_reference(monkeypatch):
    scores = (torch.randn(3, 2, 5000) * 50).round()
    always = torch.arange(5000) < 4
    budgets = gs.TopK(700), gs.Fraction(0.3), gs.BatchTopK(99.5)
    fast = [keep(scores, budget, always) for budget in budgets]
    assert [int(mask.sum()) for mask in fast] == [6 * 700, 6 * 1500, 597]
    assert all(bool(mask[..., :4].all()) for mask in fast)
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    for budget, mask in zip(budgets, fast, strict=True):
        assert torch.equal(keep(scores, budget, always), mask)


SINKS = torch.tensor([True, *[False] * 6])
EACH = [gs.TopK(2), gs.TopP(0.6), gs.Threshold(0.5), gs.Fraction(0.4), gs.BatchTopK(1.5)]


@pytest.mark.parametrize("budget", EACH, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("always", [None, SINKS], ids=["free", "sinks"])
def test_keep_follows_transforms_and_compilers(budget, always):
    scores = torch.rand(3, 5, 7)
    plain = keep(scores, budget, always)
    torch.compiler.reset()
    run = torch.compile(lambda x: keep(x, budget, always), fullgraph=True, backend="eager")
    assert torch.equal(run(scores), plain)
    if not isinstance(budget, gs.BatchTopK):
        mapped = torch.vmap(torch.vmap(lambda x: keep(x, budget, always)))(scores)
        assert torch.equal(mapped, plain)
    grown = scores.clone().requires_grad_()
    (grown * keep(grown, budget, always)).sum().backward()
    assert torch.equal(grown.grad, plain.float())


@pytest.mark.parametrize("budget", EACH, ids=lambda x: type(x).__name__)
def test_keep_waits_for_no_device(budget):
    """The meta device has no numbers: what would read one raises."""
    scores = torch.empty(3, 7, device="meta")
    assert keep(scores, budget, SINKS.to("meta")).shape == (3, 7)


def test_bad_budgets_and_scores():
    for make in (
        lambda: gs.TopK(-1), lambda: gs.TopK(2.0), lambda: gs.TopK(True),
        lambda: gs.TopP(0), lambda: gs.TopP(1.1), lambda: gs.TopP(math.nan),
        lambda: gs.Threshold(math.inf), lambda: gs.Threshold("1"),
        lambda: gs.Fraction(0.0), lambda: gs.Fraction(2), lambda: gs.BatchTopK(-0.5),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"TopK|TopP|Threshold|Fraction"):
            make()
    scores = torch.rand(2, 3)
    for bad, match in (
        (lambda: keep(scores, 3), "budget"),
        (lambda: keep(torch.tensor(1.0), gs.TopK(1)), "units"),
        (lambda: keep(scores + 1j, gs.TopK(1)), "real"),
        (lambda: keep(scores, gs.TopK(1), always=scores), "bool"),
        (lambda: keep(scores, gs.TopK(1), always=torch.ones(2, dtype=torch.bool)), "fit"),
    ):
        with pytest.raises(UsageError, match=match):
            bad()
    assert keep(torch.empty(0, 4), gs.TopP(0.5)).shape == (0, 4)
    assert keep(torch.empty(4, 0), gs.TopK(2)).shape == (4, 0)
