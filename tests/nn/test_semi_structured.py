"""2:4 tensors for CUDA: our packing is torch's own, bit for bit, and comes back."""

import warnings

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import gossamer as gs
from gossamer.nn import BitmapLinear, NMLinear
from gossamer.nn.semi_structured import from_cutlass, to_cutlass

SHAPES = [(32, 64), (64, 128), (96, 192), (256, 64), (32, 1024)]


def weight(rows, cols, dtype, holes=0.0):
    matrix = torch.randn(rows, cols)
    mask = gs.select(matrix.abs(), gs.NM(2, 4), 0.5).mask
    return (matrix * mask * (torch.rand(rows, cols) >= holes)).to(dtype)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these tensors are a prototype
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("holes", [0.0, 0.5, 1.0])
def test_packing_is_torchs(dtype, shape, holes):
    matrix = weight(*shape, dtype, holes)
    values, meta = to_cutlass(matrix)
    expected = sparse_semi_structured_from_dense_cutlass(matrix)
    assert torch.equal(values, expected[0]) and torch.equal(meta, expected[1])
    assert torch.equal(from_cutlass(values, meta), matrix)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), matrix)


@pytest.mark.parametrize("kind", ["nm", "bitmap", "matrix"])
def test_layers_go_there_and_back(kind):
    matrix, bias = weight(64, 128, torch.bfloat16), torch.randn(64)
    packed = {"nm": NMLinear.from_matrix, "bitmap": BitmapLinear.from_matrix}
    there = gs.to_semi_structured(packed[kind](matrix, bias) if kind in packed else matrix)
    assert isinstance(there, SparseSemiStructuredTensorCUTLASS)
    assert there.shape == (64, 128) and there.dtype == torch.bfloat16
    assert torch.equal(there.to_dense(), matrix)
    again = gs.from_semi_structured(there, bias)
    assert isinstance(again, NMLinear) and torch.equal(again.to_matrix(), matrix)
    x = torch.randn(2, 128)
    torch.testing.assert_close(again(x), x @ matrix.float().t() + bias, rtol=1e-4, atol=1e-4)
    half = gs.to_semi_structured(matrix.float(), torch.float16)
    assert half.packed.dtype == torch.float16


def test_torchs_own_tensors_are_read():
    matrix = weight(64, 128, torch.float16)
    values, meta = sparse_semi_structured_from_dense_cutlass(matrix)
    made = SparseSemiStructuredTensorCUTLASS(
        matrix.shape, values, meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )
    assert torch.equal(
        gs.from_semi_structured(made, dtype=torch.float32).to_matrix(), matrix.float()
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(gs.UsageError, match="not 2:4"):
        gs.to_semi_structured(torch.ones(32, 64).half())
    with pytest.raises(gs.UsageError, match="give dtype="):
        gs.to_semi_structured(torch.zeros(32, 64))
    with pytest.raises(gs.UsageError, match="32s"):
        gs.to_semi_structured(torch.zeros(33, 64).half())
    with pytest.raises(gs.UsageError, match="64s"):
        gs.to_semi_structured(torch.zeros(32, 96).half())
    with pytest.raises(gs.UsageError, match="semi-structured"):
        gs.from_semi_structured(torch.zeros(32, 64))
    with pytest.raises(gs.UsageError, match="int16"):
        from_cutlass(torch.zeros(32, 32).half(), torch.zeros(32, 4))
