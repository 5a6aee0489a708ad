"""The sparse 1x1 convolution against torch in float64, on every set of instructions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops import pointwise as ops
from gossamer.ops.pointwise import reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]


def sparse(rows, cols, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    matrix[torch.rand(rows, cols, generator=generator) > density] = 0
    return matrix


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0, 1, 127, 128, 130, 260]),
    st.sampled_from([0, 1, 60, 129, 300]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_the_form_holds_the_matrix(rows, cols, density, seed):
    matrix = sparse(rows, cols, density, seed)
    form = ops.build(matrix)
    assert torch.equal(
        reference.to_matrix((form.values, form.columns, form.rows, form.row_ptr), form.shape),
        matrix,
    )
    assert form.values.numel() == int((matrix != 0).sum()) and form.nbytes > 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (200, 257)], ids=str)
def test_products_equal_float64(isa, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(*shape)
    matrix[shape[0] // 2] = 0
    form, bias = ops.build(matrix), torch.randn(shape[0])
    for images, height, width in [(1, 1, 1), (2, 3, 5), (1, 4, 4), (3, 7, 7), (1, 8, 16),
                                  (2, 9, 11), (0, 4, 4), (1, 0, 4), (2, 1, 129)]:  # fmt: skip
        x = torch.randn(images, shape[1], height, width)
        exact = torch.einsum("oi,nihw->nohw", matrix.double(), x.double())
        found = ops.conv(x, form)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
        found = ops.conv(x.contiguous(memory_format=torch.channels_last), form, bias, 0.0, 6.0)
        exact = (exact + bias.double().reshape(-1, 1, 1)).clamp(0, 6)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
        assert found.is_contiguous()


@pytest.mark.parametrize("isa", ISAS)
def test_dropped_channels_never_touch_an_output_and_kept_ones_do(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix, x = sparse(20, 140), torch.randn(1, 140, 5, 5)
    x[0, 3, 1, 1], x[0, 130, 4, 4] = float("nan"), float("inf")
    found = ops.conv(x, ops.build(matrix), low=0.0)
    assert torch.equal(torch.isnan(found[0, :, 1, 1]), matrix[:, 3] != 0)
    assert torch.equal(torch.isinf(found[0, :, 4, 4]), matrix[:, 130] > 0)
    assert torch.isfinite(found[0, :, 0, 0]).all()


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_threads_do_not_change_the_result(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    form, x = ops.build(sparse(300, 200)), torch.randn(2, 200, 9, 9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 11):
            torch.set_num_threads(threads)
            results.append(ops.conv(x, form))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_opcheck_and_bad_input():
    form, x = ops.build(sparse(12, 9)), torch.randn(2, 9, 3, 4)
    parts = (form.values, form.columns, form.rows, form.row_ptr, 12, 9)
    torch.library.opcheck(ops._pointwise_conv, (x, *parts, torch.randn(12), 0.0, 6.0))
    for call, words in [
        (lambda: ops.conv(torch.randn(2, 8, 3, 4), form), "9 channels"),
        (lambda: ops.conv(x[0], form), "9 channels"),
        (lambda: ops.conv(x.double(), form), "float64"),
        (lambda: ops.conv(x, form, torch.randn(11)), "bias"),
        (lambda: ops.conv(x, form, low=1.0, high=0.0), "at most high"),
        (lambda: ops.build(torch.zeros(3)), "matrix"),
    ]:
        with pytest.raises(UsageError, match=words):
            call()
