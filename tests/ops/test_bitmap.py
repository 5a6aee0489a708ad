"""The bitmap kernels against their plain reference: every instruction set, shape, dtype and thread count."""

import ctypes
import mmap
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import FormatError, UsageError
from gossamer.nn import BitmapLinear
from gossamer.ops import _dispatch
from gossamer.ops import bitmap as ops
from gossamer.ops.bitmap import native, reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [name for index, name in enumerate(_dispatch.ISAS) if index <= best]
SHAPES = [(1, 1), (3, 64), (8, 65), (33, 100), (64, 515), (130, 256)]
BATCHES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 48, 63, 64, 65, 130]


def sparse(rows, cols, density=0.4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator).to(dtype)
    matrix[torch.rand(rows, cols, generator=generator) > density] = 0
    return matrix


def test_the_kernels_are_built():
    assert ISAS, "make setup builds gossamer._kernels"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.floats(0, 1), st.integers(0, 99))
def test_pack_and_unpack_are_inverse(rows, cols, density, seed):
    matrix = sparse(rows, cols, density, seed=seed)
    values, bitmap = ops.pack(matrix)
    assert values.numel() == int((matrix != 0).sum())
    assert bitmap.shape == (rows, ops.bitmap_bytes(cols))
    assert torch.equal(ops.unpack(values, bitmap, cols), matrix)
    assert torch.equal(native.row_offsets(bitmap, cols), reference.row_offsets(bitmap, cols))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(isa, dtype, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(*shape, dtype=dtype)
    matrix[shape[0] // 2] = 0
    bias = torch.randn(shape[0])
    layer = BitmapLinear.from_matrix(matrix, bias)
    assert ops.kernel_name() == f"bitmap-matvec/{isa}"
    assert ops.kernel_name(columns=True) == f"csr-matvec/{isa}"
    by_columns = BitmapLinear.from_matrix(matrix, bias)
    assert by_columns.prepare_columns() == 2 * layer.values.numel()
    for batch in BATCHES:
        x = torch.randn(batch, shape[1])
        expected = x.double() @ matrix.double().t() + bias.double()
        for each in (layer, by_columns):
            torch.testing.assert_close(each(x).double(), expected, rtol=1e-5, atol=2e-5)


def test_columns_are_those_of_the_bitmap():
    for rows, cols in SHAPES:
        matrix = sparse(rows, cols)
        values, bitmap = ops.pack(matrix)
        found = ops.columns_of(bitmap, ops.row_offsets(values, bitmap, cols), cols)
        assert found.dtype == torch.uint16
        assert torch.equal(found.long(), matrix.nonzero()[:, 1])
    matrix = torch.zeros(2, 1 << 16)
    matrix[1, -1] = 1
    layer = BitmapLinear.from_matrix(matrix)
    layer.prepare_columns()
    x = torch.randn(1, 1 << 16)
    assert layer(x)[0].tolist() == [0, x[0, -1]]
    assert "columns" not in layer.state_dict() and "columns=True" in repr(layer)
    with pytest.raises(UsageError, match="16 bits"):
        BitmapLinear.from_matrix(torch.ones(2, (1 << 16) + 1)).prepare_columns()


def at_page_end(tensor):
    """A copy whose last byte is the last before memory that must not be touched."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    room = (size + page - 1) // page * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.copy_(tensor.flatten()).reshape(tensor.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="guards a page by mprotect")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.2, 0.05])
@pytest.mark.parametrize("shape", [(1, 2565), (9, 515), (24, 1000)], ids=str)
@pytest.mark.parametrize("by_columns", [False, True])
def test_matvec_reads_nothing_past_the_end(isa, dtype, density, shape, by_columns, monkeypatch):
    """Empty rows among others, tails of any length, NaN and infinity in columns that some keep."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(*shape, density, dtype)
    matrix[1::4] = 0
    values, bitmap = ops.pack(matrix)
    offsets = ops.row_offsets(values, bitmap, shape[1])
    guarded = at_page_end(values), at_page_end(bitmap)
    columns = ops.columns_of(bitmap, offsets, shape[1])
    ends = (*guarded, offsets, None, shape[1], None, at_page_end(columns) if by_columns else None)
    for batch in (1, 2, 3, 4, 8):
        x = torch.randn(batch, shape[1])
        found = ops.linear(x, *ends)
        # A sum of 1283 products in float32, in one order or another.
        torch.testing.assert_close(
            found.double(), x.double() @ matrix.double().t(), rtol=1e-5, atol=3e-4
        )
        x[0, 70], x[0, -1] = float("nan"), float("inf")
        strange = ops.linear(x, *ends)
        touched = (matrix[:, 70] != 0) | (matrix[:, -1] != 0)
        assert torch.equal(~torch.isfinite(strange[0]), touched)
        assert torch.equal(strange[1:], found[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_bitmaps_may_lie_anywhere(isa, monkeypatch):
    """Where a file puts them; what reads them as words is seen by `make sanitize`."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(9, 130)
    values, bitmap = ops.pack(matrix)
    room = torch.zeros(bitmap.numel() + 8, dtype=torch.uint8)
    odd = room[-room.data_ptr() % 8 + 1 :][: bitmap.numel()].view_as(bitmap).copy_(bitmap)
    layer, plain = BitmapLinear(values, odd, 130, 9), BitmapLinear(values, bitmap, 130, 9)
    assert layer.bitmap.data_ptr() % 8 == 1 and torch.equal(layer.to_matrix(), matrix)
    for prepared in (False, True):
        for batch in (1, 3, 20):
            x = torch.randn(batch, 130)
            assert torch.equal(layer(x), plain(x))
        if not prepared:
            assert layer.prepare_large_batches() == plain.prepare_large_batches()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(isa, dtype, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    layer = BitmapLinear.from_matrix(sparse(700, 300, dtype=dtype))
    by_columns = BitmapLinear.from_matrix(sparse(700, 300, 0.1, dtype=dtype))
    by_columns.prepare_columns()
    x, many = torch.randn(1, 300), torch.randn(70, 300)
    blas, *again = over_threads(lambda: layer(many))  # unpacked: a product of torch's BLAS
    for other in again:
        torch.testing.assert_close(other, blas, rtol=1e-5, atol=1e-4)
    layer.unpack_from = 1 << 30
    one, *others = over_threads(lambda: (layer(x), layer(many), by_columns(x)))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_matrices(isa, density, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(20, 70, 2.0) if density else torch.zeros(20, 70)
    layer = BitmapLinear.from_matrix(matrix)
    for batch in (1, 20):
        x = torch.randn(batch, 70)
        torch.testing.assert_close(layer(x), x @ matrix.t(), rtol=1e-5, atol=1e-5)
    assert layer(torch.randn(0, 70)).shape == (0, 20)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 8, 20])
def test_nan_touches_only_rows_that_keep_the_column(isa, batch, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(40, 90)
    x = torch.randn(batch, 90)
    x[0, 7], x[0, 77] = float("nan"), float("inf")
    result = BitmapLinear.from_matrix(matrix)(x)[0]
    touched = (matrix[:, 7] != 0) | (matrix[:, 77] != 0)
    assert torch.equal(~torch.isfinite(result), touched)


def test_shapes_dtypes_and_leading_dimensions():
    layer = BitmapLinear.from_matrix(sparse(12, 64))
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 12)
    assert layer(torch.randn(64)).shape == (12,)
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    strided = torch.randn(64, 5).t()
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


def test_gradients_and_opcheck():
    matrix, bias = sparse(12, 30), torch.randn(12, requires_grad=True)
    values, bitmap = ops.pack(matrix)
    offsets = ops.row_offsets(values, bitmap, 30)
    x = torch.randn(5, 30, requires_grad=True)
    grad = torch.randn(5, 12)
    ops.linear(x, values, bitmap, offsets, bias, 30).backward(grad)
    torch.testing.assert_close(x.grad, grad @ matrix)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    torch.library.opcheck(
        torch.ops.gossamer.bitmap_linear.default, (x, values, bitmap, offsets, bias, 30)
    )
    columns = ops.columns_of(bitmap, offsets, 30)
    torch.library.opcheck(
        torch.ops.gossamer.bitmap_linear.default,
        (x, values, bitmap, offsets, bias, 30, None, columns),
    )


@pytest.mark.parametrize("isa", ["native", "reference"])
def test_what_contradicts_itself_is_refused(isa, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    values, bitmap = ops.pack(sparse(8, 100))
    with pytest.raises(FormatError, match="holds"):
        BitmapLinear(values[:-1], bitmap, 100, 8)
    with pytest.raises(FormatError, match="bytes per row"):
        BitmapLinear(values, bitmap, 300, 8)
    with pytest.raises(UsageError, match="rows"):
        BitmapLinear(values, bitmap, 100, 9)
    padded = bitmap.clone()
    padded[0, -1] |= 128
    with pytest.raises(FormatError, match="padding"):
        BitmapLinear(values, padded, 100, 8)
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        BitmapLinear(values.double(), bitmap, 100, 8)
    layer = BitmapLinear(values, bitmap, 100, 8)
    with pytest.raises(UsageError, match="width 100"):
        layer(torch.randn(2, 99))


def test_other_zeros_may_be_loaded_into_a_layer():
    """As many, elsewhere: what follows from the bitmap follows, and what contradicts it changes nothing."""
    matrix = sparse(40, 90)
    for prepare in ("", "prepare_columns", "prepare_large_batches"):
        one = BitmapLinear.from_matrix(matrix)
        other = BitmapLinear.from_matrix(matrix.flip(0).contiguous())
        if prepare:
            getattr(one, prepare)()
        one.load_state_dict(other.state_dict())
        for batch in (1, 30):
            x = torch.randn(batch, 90)
            torch.testing.assert_close(one(x), other(x))
    state = {**other.state_dict(), "bitmap": torch.zeros_like(other.bitmap)}
    before = {name: part.clone() for name, part in one.state_dict().items()}
    with pytest.raises(FormatError, match="holds"):
        one.load_state_dict(state)
    assert all(torch.equal(one.state_dict()[name], part) for name, part in before.items())


def test_forced_isa(monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", "neon")
    with pytest.raises(UsageError, match="neon"):
        _dispatch.isa()
    monkeypatch.setenv("GOSSAMER_ISA", "portable")
    assert "forced" in _dispatch.describe() or best == 0
