"""The product with blocks against its definition: block shapes, dtypes, sets of instructions."""

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.errors import UsageError
from gossamer.nn import BitmapLinear, prepare_large_batches
from gossamer.ops import _dispatch
from gossamer.ops import blocks as ops
from gossamer.ops.blocks import reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [name for index, name in enumerate(_dispatch.ISAS) if index <= best]
SHAPES = [(16, 1), (8, 1), (4, 1), (2, 3), (1, 16), (16, 16), (1, 1)]


def blocky(out, width, block, density=0.4, dtype=torch.float32, seed=0):
    """(matrix, mask) of whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(out // block[0], width // block[1], generator=generator) < density
    mask = drawn.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    matrix = torch.randn(out, width, generator=generator).to(dtype)
    return matrix * mask, mask


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", SHAPES, ids=str)
def test_products_equal_float64(isa, dtype, block, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix, mask = blocky(48, 2112, block, dtype=dtype)
    form, bias = ops.build(matrix, mask, block), torch.randn(48)
    assert torch.equal(reference.to_matrix(form.values, form.columns, form.splits, 2112), matrix)
    for batch in (0, 1, 16, 33, 64, 100, 131):
        x = torch.randn(batch, 2112)
        expected = x.double() @ matrix.double().t() + bias.double()
        found = ops.linear(x, form, bias)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-4)
        half = ops.linear(x.bfloat16(), form, bias)
        assert torch.equal(half, ops.linear(x.bfloat16().float(), form, bias).bfloat16())


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_that_are_not_kept_touch_nothing(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix, mask = blocky(48, 96, (16, 1))
    x = torch.randn(20, 96)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    found = ops.linear(x, ops.build(matrix, mask, (16, 1)))
    for row, column in ((3, 5), (4, 6)):
        assert torch.equal(torch.isfinite(found[row]), ~mask[:, column])


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result_and_rows_may_be_empty(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix, mask = blocky(160, 300, (8, 1))
    matrix[40:96], mask[40:96] = 0, False
    form, x = ops.build(matrix, mask, (8, 1)), torch.randn(150, 300)
    results = over_threads(lambda: ops.linear(x, form))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not results[0][:, 40:96].any()
    empty = ops.build(torch.zeros(16, 32), torch.zeros(16, 32, dtype=torch.bool), (16, 1))
    assert torch.equal(ops.linear(torch.randn(5, 32), empty), torch.zeros(5, 16))
    for out, width in ((0, 32), (16, 0)):
        nothing = ops.build(torch.zeros(out, width), torch.zeros(out, width).bool(), (16, 1))
        assert torch.equal(ops.linear(torch.randn(5, width), nothing), torch.zeros(5, out))


def test_opcheck():
    matrix, mask = blocky(32, 80, (16, 1))
    w = ops.build(matrix, mask, (16, 1))
    args = (torch.randn(3, 5, 80), w.values, w.columns, w.splits, torch.randn(32))
    torch.library.opcheck(ops._blocks_linear, args)


def test_what_is_not_whole_blocks_is_not_built():
    matrix, mask = blocky(32, 80, (16, 1))
    for block in ((3, 1), (32, 1), (16, 3), (16, 0)):
        assert ops.build(matrix, mask, block) is None
    mask[0] ^= True
    assert ops.build(matrix, mask, (16, 1)) is None
    assert ops.build(matrix.double(), mask, (1, 1)) is None


def test_bad_input():
    form = ops.build(*blocky(32, 80, (16, 1)), (16, 1))
    with pytest.raises(UsageError, match="width 80"):
        ops.linear(torch.randn(3, 79), form)
    with pytest.raises(UsageError, match="float16"):
        ops.linear(torch.randn(3, 80).half(), form)
    with pytest.raises(UsageError, match="bias"):
        ops.linear(torch.randn(3, 80), form, torch.randn(11))


def test_compress_serves_block_patterns_by_blocks():
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    pruned = gs.prune(model, gs.weights.Magnitude(), pattern=gs.Block(16, 1), density=0.25)
    x = torch.randn(40, 96)
    expected = model(x)
    result = gs.compress(pruned, large_batches=True)
    assert all(isinstance(layer, BitmapLinear) for layer in (model[0], model[2]))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model[0]._form[1], ops.Blocks)
    assert any("block-spmm" in str(record.kernel) for record in result.layers)


def test_a_layer_of_blocks_follows_its_values_and_falls_back():
    matrix, _ = blocky(64, 96, (16, 1))
    layer = BitmapLinear.from_matrix(matrix, torch.randn(64), pattern="block:16x1")
    plain, x = BitmapLinear.from_matrix(matrix, layer.bias), torch.randn(40, 96)
    assert prepare_large_batches(nn.Sequential(layer)) < prepare_large_batches(nn.Sequential(plain))
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.values.mul_(2)
    torch.testing.assert_close(
        layer(x) - layer.bias, 2 * (plain(x) - plain.bias), rtol=1e-4, atol=1e-4
    )
    matrix[:, 3] = torch.randn(64)
    matrix[0, 3] = 0  # a block kept in part
    partly = BitmapLinear.from_matrix(matrix, pattern="block:16x1")
    prepare_large_batches(nn.Sequential(partly))
    assert not isinstance(partly._form[1], ops.Blocks)
