"""Sparse times sparse against scipy and against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from gossamer.core.errors import UsageError
from gossamer.ops import spgemm as ops
from gossamer.ops.spgemm import native, reference

HOMES = ["reference", "portable"]


def random(rows, cols, density, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator, dtype=dtype)
    matrix[torch.rand(rows, cols, generator=generator) > density] = 0
    return matrix


def parts(matrix):
    csr = matrix.to_sparse_csr()
    return csr.crow_indices(), csr.col_indices(), csr.values()


def graph(n, degree, seed):
    """Out-degrees by a power law, targets by another: a few hubs on both sides."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, generator=generator).pow(-0.6)
    degrees = (share * degree / share.mean()).long().clamp(0, n)
    rows = torch.arange(n).repeat_interleave(degrees)
    columns = (torch.rand(len(rows), generator=generator).pow(3) * n).long()
    matrix = sparse.coo_matrix((torch.ones(len(rows)), (rows, columns)), (n, n)).tocsr()
    matrix.data[:] = torch.randn(matrix.nnz, generator=generator)
    return matrix


@pytest.mark.parametrize("isa", HOMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sort", [True, False])
def test_products_equal_dense_ones(isa, dtype, sort, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for m, k, n, density in [(1, 1, 1, 1.0), (5, 0, 4, 0.5), (0, 3, 2, 0.5), (3, 4, 0, 0.5),
                             (40, 30, 900, 0.1), (30, 70, 50, 0.9), (64, 64, 5000, 0.01)]:  # fmt: skip
        a, b = random(m, k, density, 1, dtype), random(k, n, density, 2, dtype)
        if m > 3:
            a[2] = 0
        row_ptr, columns, values = ops.multiply(*parts(a), *parts(b), n, sort)
        assert row_ptr.dtype == torch.int64 and columns.dtype == torch.int32
        found = torch.zeros(m, n, dtype=dtype)
        for i in range(m):
            span = slice(int(row_ptr[i]), int(row_ptr[i + 1]))
            assert len(set(columns[span].tolist())) == columns[span].numel()
            assert not sort or columns[span].tolist() == sorted(columns[span].tolist())
            found[i, columns[span].long()] = values[span]
        expected = (a.double() @ b.double()).to(dtype)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        pattern = ((a != 0).double() @ (b != 0).double()) > 0
        assert int(row_ptr[-1]) == int(pattern.sum())


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 12), st.integers(0, 12), st.sampled_from([1, 7, 40, 3000]),
    st.floats(0, 1), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_both_homes_agree_to_the_order_of_columns(m, k, n, density, sort, seed):
    a, b = random(m, k, density, seed), random(k, n, min(density, 20 / n + 0.01), seed + 1)
    left, right = (
        (p.long(), c.to(torch.int32), v) for p, c, v in (parts(a), parts(b))
    )  # fmt: skip
    ours, expected = native.multiply(left, right, n, sort), reference.multiply(left, right, n, sort)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_graphs_against_scipy(seed):
    for matrix in (sparse.random(2000, 2000, 0.004, "csr", rng=seed), graph(3000, 6, seed)):
        expected = (matrix @ matrix).sorted_indices()
        tensor = torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices),
            torch.from_numpy(matrix.data), matrix.shape,
        )  # fmt: skip
        found = ops.matmul(tensor, tensor)
        assert torch.equal(found.crow_indices(), torch.from_numpy(expected.indptr))
        assert torch.equal(found.col_indices(), torch.from_numpy(expected.indices))
        torch.testing.assert_close(
            found.values(), torch.from_numpy(expected.data), rtol=1e-3, atol=1e-4
        )


def test_threads_do_not_change_the_result(over_threads):
    a = random(700, 300, 0.1)
    b = parts(a.t().contiguous())
    one, *others = over_threads(lambda: ops.multiply(*parts(a), *b, 700, False), (1, 2, 3, 7))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_colliding_columns_and_odd_values():
    far = torch.arange(0, 64 * 4096, 4096)
    b = (torch.tensor([0, 64, 128]), torch.cat([far, far + 1]), torch.ones(128))
    a = (torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([float("nan"), 2.0]))
    row_ptr, columns, values = ops.multiply(*a, *b, 1 << 20, True)
    assert columns.tolist() == sorted([*far.tolist(), *(far + 1).tolist()])
    assert torch.equal(torch.isnan(values), columns % 2 == 1) and row_ptr.tolist() == [0, 128]
    cancel = ops.multiply(*parts(torch.tensor([[1.0, -1.0]])), *parts(torch.ones(2, 1)), 1)
    assert cancel[2].tolist() == [0.0]


def test_opcheck_and_bad_input():
    a = random(6, 5, 0.5)
    left = tuple(part.contiguous() for part in parts(a))
    wide = (left[0].long().clone(), left[1].to(torch.int32), left[2].clone())
    right = parts(a.t().contiguous())
    wide_right = (right[0].long().clone(), right[1].to(torch.int32), right[2].clone())
    torch.library.opcheck(ops._spgemm, (*wide, *wide_right, 6, True))
    ptr, columns, values = right
    for call, words in [
        (lambda: ops.matmul(a, a), "CSR"),
        (lambda: ops.matmul(a.to_sparse_csr(), a.to_sparse_csr()), "cannot multiply"),
        (lambda: ops.multiply(*left, ptr, columns, values.double(), 6), "both float32"),
        (lambda: ops.multiply(*left, ptr, columns, values, 3), "outside"),
        (lambda: ops.multiply(*left, ptr, columns, values, -1), "31 bits"),
        (lambda: ops.multiply(*left, ptr, columns[1:], values, 6), "columns for"),
        (lambda: ops.multiply(*left, ptr.flip(0), columns, values, 6), "rise from 0"),
        (lambda: ops.multiply(*left, ptr.float(), columns, values, 6), "int32 or int64"),
        (lambda: ops.multiply(*left, ptr[:-1], columns, values, 6), "rise|outside"),
    ]:
        with pytest.raises(UsageError, match=words):
            call()
