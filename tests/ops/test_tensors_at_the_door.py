"""Arrays at the compiled module's door: checked types, shapes and lifetimes, and a cheap way in."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from gossamer.ops import _dispatch, bitmap

if _dispatch.kernels() is None:
    pytest.skip("needs the compiled kernels", allow_module_level=True)
module = _dispatch.compiled()
FAKE = FakeTensorMode().from_tensor(torch.zeros(6, 16, dtype=torch.uint8))


class Exported(torch.Tensor):
    """A tensor as torch before 2.10 offers it: by the Python methods of DLPack alone."""

    __dlpack_c_exchange_api__ = None


@pytest.fixture
def packed():
    matrix = torch.randn(6, 100)
    matrix[matrix.abs() < 0.5] = 0
    values, bits = bitmap.pack(matrix, matrix != 0)
    return matrix, (bits, values, bitmap.row_offsets(values, bits, 100))


def product(parts, x):
    y = torch.empty(*x.shape[:-1], 6)
    module.BitmapMatrix(*parts, None, 100).matvec(x, y, None, 1, 0)
    return y


def test_every_kind_of_array_gives_the_same_product(packed):
    matrix, parts = packed
    x = torch.randn(2, 100)
    expected = product(parts, x)
    torch.testing.assert_close(expected, x @ matrix.t())
    assert torch.equal(product([part.numpy() for part in parts], x.numpy()), expected)
    assert torch.equal(product(parts, x.clone().requires_grad_()), expected)
    assert torch.equal(product(parts, torch.nn.Parameter(x)), expected)
    old = x.clone().requires_grad_().as_subclass(Exported)
    assert torch.equal(product([part.as_subclass(Exported) for part in parts], old), expected)
    assert torch.equal(product(parts, x.reshape(1, 1, 1, 1, 2, 100)).reshape(2, 6), expected)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda b, v, p, x: (b, v.double(), p, x), "values is float64 .* expected float32"),
        (
            lambda b, v, p, x: (b, v, p.int(), x),
            r"row offsets is int32 \(7\); expected int64 \(7\)",
        ),
        (
            lambda b, v, p, x: (b[:, :8], v, p, x),
            r"bitmap is uint8 \(6, 8\).* expected uint8 \(6, 16\)",
        ),
        (lambda b, v, p, x: (b.t().contiguous().t(), v, p, x), "not contiguous"),
        (lambda b, v, p, x: (b.flatten(), v, p, x), "bitmap is uint8 "),
        (lambda b, v, p, x: (b, v[:-1], p, x), "do not end at the number of values"),
        (lambda b, v, p, x: (b, v, p, x.half()), "x is another type"),
        (lambda b, v, p, x: (b, v, p, x[:, :99].contiguous()), "bad batch"),
        (lambda b, v, p, x: (b, v, p, torch.randn(9, 100)), "bad batch"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(packed, change, said):
    *parts, x = change(*packed[1], torch.randn(2, 100))
    with pytest.raises(ValueError, match=said):
        product(parts, x)


@pytest.mark.parametrize("other", [3, None, "bits", [1.0], torch.empty(6, 16, device="meta"), FAKE])
def test_what_holds_no_memory_is_a_type_error(packed, other):
    with pytest.raises(TypeError):
        product((other, *packed[1][1:]), torch.randn(1, 100))


def test_a_matrix_keeps_its_arrays_and_lets_them_go(packed):
    matrix, parts = packed
    copies = [part.clone() for part in parts]
    held = module.BitmapMatrix(*copies, None, 100)
    gone = [weakref.ref(part) for part in copies]
    del copies
    gc.collect()
    assert all(ref() is not None for ref in gone)
    x, y = torch.randn(1, 100), torch.empty(1, 6)
    held.matvec(x, y, None, 1, 0)
    torch.testing.assert_close(y, x @ matrix.t())
    del held
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_rows_may_lie_apart_only_where_that_is_asked_for():
    total, rest = torch.zeros(4, 8), torch.zeros(4, 8)
    product = torch.randn(4, 3)
    module.compensated_add(total[:, 2:5], rest[:, 2:5], product, 1)
    assert torch.equal(total[:, 2:5], product) and total[:, :2].count_nonzero() == 0
    with pytest.raises(ValueError, match="total is float32"):
        module.compensated_add(total.t()[:4, :3], rest[:, 2:5], product, 1)
    mask = np.empty((4, 3), dtype=bool)
    with pytest.raises(ValueError, match="not contiguous"):
        module.top_mask(total[:, :3], 1, mask, 1)
