"""On a CUDA device: torch's sparse product of our 2:4 weights. Run: pytest -m gpu tests/gpu"""

import warnings

import pytest
import torch
from torch.nn import functional

import gossamer as gs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_that_of_the_dense_weight(dtype):
    torch.manual_seed(0)
    matrix = torch.randn(256, 512) / 16
    matrix = (matrix * gs.select(matrix.abs(), gs.NM(2, 4), 0.5).mask).to(dtype).cuda()
    x = torch.randn(64, 512).to(dtype).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = gs.to_semi_structured(matrix)
        expected = functional.linear(x, matrix)
        torch.testing.assert_close(functional.linear(x, sparse), expected, rtol=2e-2, atol=2e-2)
        made = torch.sparse.to_sparse_semi_structured(matrix)  # of whichever backend is there
        layer = gs.from_semi_structured(
            made, dtype=dtype if dtype != torch.float16 else torch.float32
        )
    assert torch.equal(layer.to_matrix().to(dtype), matrix.cpu())
