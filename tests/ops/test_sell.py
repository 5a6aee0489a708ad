"""The SELL product against its definition: shapes, dtypes, sets of instructions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import UsageError
from gossamer.nn import BitmapLinear, prepare_large_batches
from gossamer.ops import _dispatch
from gossamer.ops import bitmap as bitmap_ops
from gossamer.ops import sell as ops
from gossamer.ops.sell import native, reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [name for index, name in enumerate(_dispatch.ISAS) if index <= best]


def sparse(rows, cols, density=0.4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator).to(dtype)
    matrix[torch.rand(rows, cols, generator=generator) > density] = 0
    return matrix


def packed(matrix):
    values, bitmap = bitmap_ops.pack(matrix)
    return values, bitmap, bitmap_ops.row_offsets(values, bitmap, matrix.shape[1]), matrix.shape[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 11),
    st.sampled_from([1, 63, 64, 65, 130, 1023, 1024, 1025, 2100]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_the_form_holds_the_matrix_and_both_homes_build_it_alike(rows, cols, density, dtype, seed):
    matrix = sparse(rows, cols, density, dtype, seed)
    parts = native.build(*packed(matrix))
    for ours, expected in zip(parts, reference.build(*packed(matrix)), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(reference.to_matrix(parts, (rows, cols)), matrix)
    assert parts[-1][-1].tolist() == [
        len(parts[3]),
        len(parts[2]),
        len(parts[1]),
        len(parts[0]) - 1,
    ]


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (6, 65), (33, 1100), (130, 256)], ids=str)
def test_products_equal_float64(isa, dtype, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(*shape, dtype=dtype)
    matrix[shape[0] // 2] = 0
    form, bias = ops.build(*packed(matrix)), torch.randn(shape[0])
    for batch in (0, 1, 15, 16, 17, 33, 48, 64, 65, 131):
        x = torch.randn(batch, shape[1])
        expected = x.double() @ matrix.double().t() + bias.double()
        torch.testing.assert_close(
            ops.linear(x, form, bias).double(), expected, rtol=1e-5, atol=1e-4
        )
        rounded = ops.linear(x.bfloat16(), form, bias)
        exact = ops.linear(x.bfloat16().float(), form, bias)
        assert torch.equal(rounded, exact.bfloat16())
        assert torch.equal(ops.linear(x, form, bias, relu=True), exact_relu(x, form, bias))


def exact_relu(x, form, bias):
    return torch.relu(ops.linear(x, form, bias))


@pytest.mark.parametrize("isa", ISAS)
def test_dropped_columns_never_touch_a_row_and_kept_ones_do(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(9, 70)
    x = torch.randn(20, 70)
    x[3, 5], x[4, 6], x[5, 7] = float("nan"), float("inf"), float("-inf")
    found = ops.linear(x, ops.build(*packed(matrix)))
    for row, column in ((3, 5), (4, 6), (5, 7)):
        assert torch.equal(torch.isfinite(found[row]), matrix[:, column] == 0)
    rounded = ops.linear(x.bfloat16(), ops.build(*packed(matrix)))
    assert torch.equal(torch.isnan(rounded), torch.isnan(found))


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    form, x = ops.build(*packed(sparse(150, 1200))), torch.randn(70, 1200)
    one, *others = over_threads(lambda: ops.linear(x, form))
    assert all(torch.equal(one, other) for other in others)


def test_opcheck_and_compile():
    form, x = ops.build(*packed(sparse(12, 80))), torch.randn(3, 5, 80)
    w = form
    args = (x, w.values, w.columns, w.rows, w.groups, w.offsets, torch.randn(12), True)
    torch.library.opcheck(ops._sell_linear, (*args, 12, 80))


def test_bad_input():
    form = ops.build(*packed(sparse(12, 80)))
    with pytest.raises(UsageError, match="width 80"):
        ops.linear(torch.randn(3, 79), form)
    with pytest.raises(UsageError, match="float16"):
        ops.linear(torch.randn(3, 80).half(), form)
    with pytest.raises(UsageError, match="bias"):
        ops.linear(torch.randn(3, 80), form, torch.randn(11))


def test_a_layer_takes_the_form_for_batches_and_never_a_stale_one():
    matrix, x = sparse(40, 90), torch.randn(32, 90)
    layer = BitmapLinear.from_matrix(matrix, torch.randn(40))
    plain = layer(x)
    keys = set(layer.state_dict())
    assert prepare_large_batches(torch.nn.Sequential(layer)) > 0
    assert set(layer.state_dict()) == keys
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.values.mul_(2)
        torch.testing.assert_close(
            layer(x) - layer.bias, 2 * (plain - layer.bias), rtol=1e-4, atol=1e-5
        )
    layer.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    x.requires_grad_()
    layer.float()(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("isa", ["native", "reference"])
def test_a_batch_without_the_form_is_unpacked_piece_by_piece(isa, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(900, 1500, density=0.6)
    layer = BitmapLinear.from_matrix(matrix, torch.randn(900))
    x = torch.randn(20, 1500)
    torch.testing.assert_close(layer(x), x @ matrix.t() + layer.bias, rtol=1e-4, atol=1e-4)
    x[2, 7] = float("nan")
    assert torch.equal(torch.isnan(layer(x)[2]), matrix[:, 7] != 0)
