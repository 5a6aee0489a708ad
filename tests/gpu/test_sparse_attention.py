"""On a CUDA device: choosers choose as on the CPU. Run: pytest -m gpu tests/gpu"""

import pytest
import torch
from examples import ATTENTION

import gossamer as gs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_outputs_are_those_of_the_cpu(name):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 100, 16, generator=generator) for heads in (4, 2, 2)]
    here = gs.attend(*tensors, ATTENTION[name](), causal=True)
    there = gs.attend(*(x.cuda() for x in tensors), ATTENTION[name](), causal=True)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)
