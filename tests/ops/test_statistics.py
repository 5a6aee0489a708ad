"""Statistics kernels: masks equal torch's bit for bit; compensated sums stay exact where plain drift."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.core import select as core
from gossamer.core.errors import UsageError
from gossamer.core.stats import Hessian
from gossamer.ops import _dispatch
from gossamer.ops import statistics as ops
from gossamer.ops.statistics import reference

if _dispatch.kernels() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)


def scores_of(kind, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=generator)
    if kind == "ties":
        scores = (scores * 2).round()  # zeros of both signs among them
    if kind == "equal":
        scores = torch.full((rows, n), -0.0)
        scores[:, ::3] = 0.0
    if kind == "infinite":
        scores[torch.rand(rows, n, generator=generator) < 0.3] = torch.inf
        scores[torch.rand(rows, n, generator=generator) < 0.3] = -torch.inf
    if kind == "tiny":
        scores = scores * 1e-42
    return scores


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["random", "ties", "equal", "infinite", "tiny"]),
    st.integers(0, 40),
    st.sampled_from([1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 200, 1000]),
    st.integers(0, 99),
    st.data(),
)
def test_masks_are_those_of_torch(kind, rows, n, seed, data):
    k = data.draw(st.integers(-1, n + 1))
    scores = scores_of(kind, rows, n, seed)
    found = ops.top_mask(scores, k)
    assert found.dtype == torch.bool and torch.equal(found, core.top_mask(scores, k))


@pytest.mark.parametrize("n", [4, 8, 100])
def test_what_the_kernel_does_not_serve_goes_to_torch(n):
    scores = torch.randn(50, n)
    holed = scores.clone()
    holed[7, 1] = torch.nan
    for case in (holed, scores.double(), scores.half().float().int(), scores.t()[:, :20]):
        k = case.shape[1] // 2
        assert torch.equal(ops.top_mask(case, k), core.top_mask(case, k))


def test_threads_do_not_change_the_mask(over_threads):
    scores = (torch.randn(700, 300) * 3).round()
    for case, k in ((scores, 100), (scores.reshape(-1, 4), 2), (scores.reshape(1, -1), 5000)):
        for mask in over_threads(lambda case=case, k=k: ops.top_mask(case, k)):
            assert torch.equal(mask, core.top_mask(case, k))


@pytest.mark.parametrize(
    "pattern", ["2:4", "1:8", "unstructured", "unstructured:row", "unstructured:column",
                "block:4x1", "channel:0"]
)  # fmt: skip
def test_selection_is_the_same_with_either(pattern):
    parsed, scores = gs.parse_pattern(pattern), (torch.randn(64, 96) * 4).round()
    density = parsed.density if isinstance(parsed, gs.NM) else 0.4
    plain = gs.select(scores, parsed, density)
    fast = gs.select(scores, parsed, density, top=ops.top_mask)
    assert torch.equal(plain.mask, fast.mask)
    with pytest.raises(gs.NonFiniteError):
        gs.select(scores / 0, parsed, density, top=ops.top_mask)


@pytest.mark.parametrize("isa", ["native", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (700, 33), (1500, 600), (0, 20)])
def test_gram_sums_are_exact_to_float32(isa, shape, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", "reference")
    x = torch.randn(shape) + 3  # all products positive: plain sums drift most
    hessian = Hessian(add=ops.add_gram)
    state = hessian.init(shape[1])
    for rows in x.split(300):
        state = hessian.update(state, rows)
    found = hessian.finalize(state, "x").hessian
    exact = 2 / max(1, shape[0]) * x.double().t() @ x.double()
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_compensated_sums_keep_what_plain_ones_lose():
    """A million small products on top of a large one."""
    x = torch.full((4096, 4), 1e-2)
    total, rest = torch.full((4, 4), 1e6), torch.zeros(4, 4)
    plain = total.clone()
    for _ in range(100):
        ops.add_gram(total, rest, x)
        plain.addmm_(x.t(), x)
    added = 100 * 4096 * x.double()[0, 0] ** 2
    ours = (total.double() + rest.double())[0, 0]
    bound = 2.0**-16 * added  # 256 rows in any order of summation
    assert abs(ours - 1e6 - added) < bound < 1e-2 * abs(plain.double()[0, 0] - 1e6 - added)


@pytest.mark.parametrize("columns", [1, 4, 33, 600])
def test_products_are_short_enough_for_any_order_of_summation(columns):
    """256 products of numbers up to 255 are exact in float32 however they are summed."""
    x = 2 * torch.randint(120, 128, (4000, columns)).float() + 1
    total, rest = torch.zeros(columns, columns), torch.zeros(columns, columns)
    ops.add_gram(total, rest, x)
    exact = x.double().t() @ x.double()
    assert torch.equal((total.double() + rest.double()).triu(), exact.triu())


def test_kernel_and_reference_add_alike():
    total, rest, product = torch.randn(3, 40, 40).unbind()
    expected = total.clone(), rest.clone()
    reference.compensated_add(*expected, product)
    ops._add(total, rest, product)
    assert torch.equal(total, expected[0]) and torch.equal(rest, expected[1])


def test_states_merge():
    x = torch.randn(400, 20) + 1
    hessian, plain = Hessian(add=ops.add_gram), Hessian()
    parts = [hessian.update(hessian.init(20), rows) for rows in x.split(150)]
    whole = hessian.merge(hessian.merge(parts[0], parts[1]), parts[2])
    expected = hessian.finalize(hessian.update(hessian.init(20), x), "x").hessian
    torch.testing.assert_close(hessian.finalize(whole, "x").hessian, expected)
    assert whole.count == 400
    with pytest.raises(UsageError, match="cannot merge"):
        hessian.merge(plain.update(plain.init(20), x), whole)


def test_bad_input():
    total = torch.zeros(4, 4)
    for parts in (
        (total, total, torch.zeros(3, 5)),
        (total, total, torch.zeros(3, 4).double()),
        (total, torch.zeros(4, 5), torch.zeros(3, 4)),
        (total, torch.zeros(8, 4)[::2], torch.zeros(3, 4)),
    ):
        with pytest.raises(UsageError, match="Gram"):
            ops.add_gram(*parts)
