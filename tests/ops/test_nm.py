"""N:M matrices: kernels against the reference, the reference against plain arithmetic, and the storage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gossamer.core.errors import FormatError, UsageError
from gossamer.nn import NMLinear, prepare_large_batches
from gossamer.ops import _dispatch
from gossamer.ops import nm as ops
from gossamer.ops.nm import Layout, reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [name for index, name in enumerate(_dispatch.ISAS) if index <= best]
PATTERNS = [
    (1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (3, 8), (1, 16), (8, 16), (5, 16), (4, 16),
    (1, 32), (16, 32), (8, 32), (31, 32),
]  # fmt: skip
SHAPES = [(1, 1), (5, 100), (8, 64), (3, 1030)]


def sparse(rows, cols, keep, group, dtype=torch.float32, seed=0):
    """At most `keep` non-zeros in every group, in most of them exactly so many."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator).to(dtype)
    keys = functional.pad(torch.rand(rows, cols, generator=generator), (0, -cols % group))
    keys = keys.reshape(rows, keys.shape[1] // group, group)
    mask = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, keys.topk(keep, -1).indices, True)
    return matrix * mask.flatten(1)[:, :cols]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(0, 300),
    st.sampled_from(PATTERNS),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_pack_and_unpack_are_inverse(rows, cols, pattern, dtype, seed):
    matrix, layout = sparse(rows, cols, *pattern, dtype, seed), Layout(*pattern, cols)
    matrix[torch.rand(rows, cols) < 0.1] = 0  # groups with fewer non-zeros too
    assert ops.fits(matrix, *pattern)
    values, codes = ops.pack(matrix, *pattern)
    assert values.nbytes + codes.nbytes == layout.nbytes(rows, matrix.element_size())
    assert torch.equal(ops.unpack(values, codes, layout), matrix)
    assert torch.equal(reference.unpack(values, codes, layout), matrix)
    ops.check(values, codes, layout)
    reference.check(values, codes, layout)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_kernels_equal_the_reference(isa, pattern, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            matrix, bias = sparse(*shape, *pattern, dtype), torch.randn(shape[0])
            values, codes = ops.pack(matrix, *pattern)
            layout = Layout(*pattern, shape[1])
            for batch in (1, 2, 3, 4, 7, 8, 9):
                x = torch.randn(batch, shape[1])
                expected = x.double() @ matrix.double().t() + bias.double()
                found = ops.linear(x, values, codes, bias, layout)
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
            expected = reference.linear(x, values, codes, bias, layout)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("pattern", [(2, 4), (3, 8), (1, 16), (8, 32)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 8, 12])
def test_nan_touches_only_rows_that_store_the_column(isa, pattern, batch, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    layout = Layout(*pattern, 230)
    values, codes = ops.pack(sparse(40, 230, *pattern), *pattern)
    x = torch.randn(batch, 230)
    x[0, 7], x[0, 150], x[0, 201] = torch.nan, torch.inf, -torch.inf
    stored = reference.columns(codes, layout)
    touched = torch.zeros(40, dtype=torch.bool)
    for column in (7, 150, 201):
        touched |= (stored == column).any(1)
    assert touched.any() and not touched.all()
    assert torch.equal(~torch.isfinite(ops.linear(x, values, codes, None, layout)[0]), touched)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    layers = [NMLinear.from_matrix(sparse(701, 300, n, m), None, f"{n}:{m}") for n, m in PATTERNS]
    inputs = [torch.randn(rows, 300) for rows in (1, 3, 8)]
    one, *others = over_threads(lambda: [layer(x) for layer in layers for x in inputs])
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(one, found, strict=True))


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
def test_empty_and_zero_matrices(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    layer = NMLinear.from_matrix(torch.zeros(20, 70))
    assert layer.kept == 0 and bool((layer(torch.randn(3, 70)) == 0).all())
    assert layer(torch.randn(0, 70)).shape == (0, 20)
    assert NMLinear.from_matrix(torch.zeros(0, 70))(torch.randn(2, 70)).shape == (2, 0)
    assert NMLinear.from_matrix(torch.zeros(4, 0))(torch.randn(2, 0)).tolist() == [[0.0] * 4] * 2


def test_bytes_are_what_the_pattern_needs():
    """Of 4096 columns in bfloat16: 16 bits and a code per kept value, rounded up to words."""
    bits = {(2, 4): 9, (1, 4): 4.5, (2, 8): 4.8, (4, 8): 9.6, (1, 16): 1.25, (1, 32): 0.6875}
    for pattern, expected in bits.items():
        found = Layout(*pattern, 4096).nbytes(1, 2) * 8 / 4096
        assert found == pytest.approx(expected, rel=0.04), pattern
    assert Layout(2, 4, 768).code_bytes == 768 // 8  # a bitmap would take as many


def test_shapes_dtypes_and_leading_dimensions():
    layer = NMLinear.from_matrix(sparse(12, 64, 2, 4), torch.randn(12))
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 12)
    assert layer(torch.randn(64)).shape == (12,)
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    strided = torch.randn(64, 5).t()
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))
    half = NMLinear.from_matrix(sparse(12, 64, 2, 4)).bfloat16()
    assert half.values.dtype == torch.bfloat16 and half.codes.dtype == torch.uint8
    torch.testing.assert_close(half.to_matrix(), sparse(12, 64, 2, 4).bfloat16())


def test_gradients_and_opcheck():
    matrix, bias = sparse(12, 30, 2, 4), torch.randn(12, requires_grad=True)
    values, codes = ops.pack(matrix, 2, 4)
    x, grad = torch.randn(5, 30, requires_grad=True), torch.randn(5, 12)
    ops.linear(x, values, codes, bias, Layout(2, 4, 30)).backward(grad)
    torch.testing.assert_close(x.grad, grad @ matrix)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    torch.library.opcheck(torch.ops.gossamer.nm_linear.default, (x, values, codes, bias, 2, 4, 30))


def test_prepared_batches_follow_the_values():
    layer = NMLinear.from_matrix(sparse(70, 96, 2, 4), torch.randn(70))
    x = torch.randn(40, 96)
    assert layer.batch_kernel is None
    plain = layer(x)
    assert prepare_large_batches(torch.nn.Sequential(layer)) > 0
    assert layer.batch_kernel.startswith("sell")
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    layer.values.mul_(2)
    expected = 2 * (plain - layer.bias) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["native", "reference"])
def test_bad_input(isa, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    with pytest.raises(UsageError, match="more than 2 of 4"):
        ops.pack(torch.ones(3, 8), 2, 4)
    with pytest.raises(UsageError, match="N:M kernels take"):
        ops.pack(torch.zeros(3, 8), 2, 5)
    with pytest.raises(UsageError, match="only a matrix"):
        ops.pack(torch.zeros(8), 2, 4)
    with pytest.raises(UsageError, match="such as 2:4"):
        NMLinear.from_matrix(torch.zeros(3, 8), None, "unstructured")
    with pytest.raises(UsageError, match="unknown pattern"):
        NMLinear.from_matrix(torch.zeros(3, 8), None, "two of four")
    layer = NMLinear.from_matrix(sparse(8, 100, 2, 4))
    with pytest.raises(UsageError, match="width 100"):
        layer(torch.randn(2, 99))
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        NMLinear(layer.values.double(), layer.codes, 100, 8)
    with pytest.raises(UsageError, match="rows"):
        NMLinear(layer.values, layer.codes, 100, 9)
    with pytest.raises(UsageError, match="bias"):
        ops.linear(torch.randn(2, 100), layer.values, layer.codes, torch.zeros(9), layer.layout)
    assert not ops.fits(torch.ones(2, 6), 1, 4) and ops.fits(torch.eye(4), 1, 4)


def broken(keep, group, cols, what):
    values, codes = ops.pack(sparse(6, cols, keep, group), keep, group)
    layout = Layout(keep, group, cols)
    match what:
        case "order":  # the second place of a group becomes the first
            places = reference.from_words(codes, layout)
            places[2, 1] = places[2, 0]
            codes = reference._to_words(places, layout)
        case "unused":
            codes[-1, -1] |= 128
        case "beyond":
            values[3][reference.columns(codes, layout)[3] >= cols] = 1
        case "short":
            codes = codes[:, :-16]
        case "values":
            values = values[:, :-16]
        case "dtype":
            codes = codes.int()
        case "flat":
            values = values.reshape(-1)
    return values, codes, layout


@pytest.mark.parametrize("what", ["order", "unused", "beyond", "short", "values", "dtype", "flat"])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (2, 8)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_contradicting_parts_are_refused(what, pattern, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(_dispatch, "kernels", lambda: None)
    values, codes, layout = broken(*pattern, 200, what)
    with pytest.raises(FormatError):
        ops.check(values, codes, layout)
