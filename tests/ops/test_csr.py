"""Products with compressed rows and their gradients, against dense float64 and scipy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops import csr as ops
from gossamer.ops.csr import native, reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [name for index, name in enumerate(_dispatch.ISAS) if index <= best]


def sparse(out, cols, density=0.4, seed=0):
    """(index, values, dense matrix)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(out, cols, generator=generator) < density
    positions = mask.reshape(-1).nonzero().reshape(-1)
    values = torch.randn(positions.numel(), generator=generator)
    return ops.build(positions, (out, cols)), values, dense(values, positions, (out, cols))


def dense(values, positions, shape):
    matrix = values.new_zeros(shape[0] * shape[1])
    return matrix.index_put((positions,), values).reshape(shape)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 5, 130, 1023, 1024, 1025, 2100]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_the_index_holds_the_positions_both_ways(out, cols, density, seed):
    index, values, matrix = sparse(out, cols, density, seed)
    assert torch.equal(index.positions, (matrix != 0).reshape(-1).nonzero().reshape(-1))
    columns = reference.rows_of(index.column_splits)
    turned = columns * out + index.rows
    assert torch.equal(dense(values[index.places.long()], turned, (cols, out)), matrix.t())
    for block, starts in enumerate(index.splits):
        before = (matrix[:, : block * 1024] != 0).sum(1)
        assert torch.equal(starts - index.splits[0], before)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 65), (33, 1100), (130, 256)], ids=str)
def test_products_and_gradients_equal_dense_float64(isa, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    index, values, matrix = sparse(*shape)
    keep = matrix != 0
    bias = torch.randn(shape[0])
    for batch in (0, 1, 15, 17, 33, 64, 100, 128, 131):
        x, dy = torch.randn(batch, shape[1]), torch.randn(batch, shape[0])
        leaves = [t.clone().requires_grad_() for t in (x, values, bias)]
        y = ops.linear(*leaves[:2], index, leaves[2])
        exact = x.double() @ matrix.double().t() + bias
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
        y.backward(dy)
        wanted = (dy.double() @ matrix.double(), (dy.double().t() @ x.double())[keep])
        for leaf, exact in zip(leaves, (*wanted, dy.double().sum(0)), strict=True):
            torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=2e-4)


def test_gradcheck_and_leading_dimensions():
    index, values, matrix = sparse(7, 12)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    weights = values.double().requires_grad_()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: ops.linear(a[0], a[1], index, a[2]), (x, weights, bias)
    )
    exact = x @ matrix.double().t() + bias
    torch.testing.assert_close(ops.linear(x, weights, index, bias), exact)


def test_only_the_gradients_that_are_wanted_are_computed():
    index, values, matrix = sparse(20, 70)
    x = torch.randn(5, 70, requires_grad=True)
    ops.linear(x, values, index).sum().backward()
    torch.testing.assert_close(x.grad, matrix.sum(0).expand(5, 70), rtol=1e-5, atol=1e-5)
    values.requires_grad_()
    ops.linear(x.detach(), values, index).sum().backward()
    torch.testing.assert_close(values.grad, x.detach().sum(0)[index.columns.long()])


def test_scipy_agrees():
    scipy = pytest.importorskip("scipy.sparse")
    index, values, _ = sparse(200, 300, 0.1)
    row_ptr = torch.cat([index.splits[0], index.splits[-1, -1:]])
    matrix = scipy.csr_matrix((values.numpy(), index.columns.numpy(), row_ptr.numpy()), (200, 300))
    x = torch.randn(40, 300)
    found = ops.linear(x, values, index)
    torch.testing.assert_close(
        found, torch.from_numpy((matrix @ x.t().numpy()).T), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("isa", ISAS)
def test_weights_that_are_not_kept_touch_nothing(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    index, values, matrix = sparse(9, 70)
    x = torch.randn(20, 70)
    x[3, 5], x[4, 6], x[5, 7] = float("nan"), float("inf"), float("-inf")
    found = ops.linear(x, values, index)
    for row, column in ((3, 5), (4, 6), (5, 7)):
        assert torch.equal(torch.isfinite(found[row]), matrix[:, column] == 0)
    grad = ops.sampled(x, torch.ones(20, 9), index)
    odd = (index.columns >= 5) & (index.columns <= 7)
    assert torch.equal(torch.isfinite(grad), ~odd)
    expected = reference.linear(x, values, index.columns, index.splits, None)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    index, values, _ = sparse(150, 1200)
    x, dy = torch.randn(70, 1200), torch.randn(70, 150)

    def run():
        grad = native.linear(dy, values, index.places, index.rows, index.column_splits, None)
        return ops.linear(x, values, index), grad, ops.sampled(x, dy, index)

    one, *others = over_threads(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("isa", ["native", "reference"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 2000)], ids=str)
def test_empty_matrices(shape, isa, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    index = ops.build(torch.empty(0, dtype=torch.int64), shape)
    values = torch.empty(0, requires_grad=True)
    x = torch.randn(4, shape[1], requires_grad=True)
    y = ops.linear(x, values, index)
    assert torch.equal(y, torch.zeros(4, shape[0]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, shape[1]))
    assert values.grad.shape == (0,)


def test_opcheck():
    index, values, _ = sparse(12, 80)
    i = index
    x = torch.randn(3, 5, 80, requires_grad=True)
    values.requires_grad_()
    bias = torch.randn(12, requires_grad=True)
    args = (x, values, bias, i.columns, i.splits, i.rows, i.column_splits, i.places)
    torch.library.opcheck(ops._csr_linear, args)
    dy = torch.randn(3, 5, 12)
    torch.library.opcheck(ops._grad_x, (dy, values.detach(), i.rows, i.column_splits, i.places))
    torch.library.opcheck(ops._grad_values, (x.detach(), dy, i.columns, i.splits))


def test_bfloat16_inputs_are_summed_in_float32():
    index, values, _ = sparse(12, 80)
    x = torch.randn(20, 80).bfloat16().requires_grad_()
    found = ops.linear(x, values, index)
    assert torch.equal(found, ops.linear(x.detach().float(), values, index).bfloat16())
    found.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_bad_input():
    index, values, _ = sparse(12, 80)
    x = torch.randn(3, 80)
    with pytest.raises(UsageError, match="width 80"):
        ops.linear(torch.randn(3, 79), values, index)
    with pytest.raises(UsageError, match="values for"):
        ops.linear(x, values[1:], index)
    with pytest.raises(UsageError, match="float16"):
        ops.linear(x, values.half(), index)
    with pytest.raises(UsageError, match="bias"):
        ops.linear(x, values, index, torch.randn(11))
    with pytest.raises(UsageError, match="do not fit"):
        ops.sampled(x, torch.randn(3, 11), index)


def test_a_bad_index_is_refused():
    for positions, message in (([3, 3], "ascend"), ([4, 1], "ascend"), ([-1, 2], "outside")):
        with pytest.raises(UsageError, match=message):
            ops.build(torch.tensor(positions), (2, 5))
    with pytest.raises(UsageError, match="outside"):
        ops.build(torch.tensor([10]), (2, 5))
    with pytest.raises(UsageError, match="int64"):
        ops.build(torch.tensor([1.0]), (2, 5))
    many = torch.zeros(1, dtype=torch.int64).expand(2**31)
    for positions, shape in (
        (many, (2**20, 2**20)),
        (many[:1], (2**31, 1)),
        (many[:1], (1, 2**31)),
    ):
        with pytest.raises(UsageError, match="2147483647"):
            ops.build(positions, shape)
