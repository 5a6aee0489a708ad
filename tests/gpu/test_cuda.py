"""On a CUDA device: pruning there gives the masks of the CPU. Run: pytest -m gpu tests/gpu"""

import copy

import pytest
import torch
from examples import PRUNERS
from torch import nn

import gossamer as gs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()


def data(device):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator).to(device) for _ in range(4)]


@pytest.mark.parametrize("pattern", [gs.Unstructured(), gs.NM(2, 4), gs.Block(4, 1)], ids=str)
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_masks_are_those_of_the_cpu(name, pattern):
    here, there = model(), model().cuda()
    density = None if isinstance(pattern, gs.NM) else 0.5
    one = gs.prune(here, PRUNERS[name](), pattern=pattern, density=density, data=data("cpu"))
    two = gs.prune(there, PRUNERS[name](), pattern=pattern, density=density, data=data("cuda"))
    for layer, support in one.supports.items():
        same = (support.mask == two.supports[layer].mask.cpu()).float().mean()
        assert same > 0.999, layer  # sums in another order may turn a tie


def test_compress_refuses_cuda_weights_and_save_reloads_on_the_cpu(tmp_path):
    there = model().cuda()
    result = gs.prune(there, gs.weights.Magnitude(), density=0.5)
    packed = gs.compress(copy.deepcopy(there))
    assert all(r.kernel is None and "CPU" in r.reason for r in packed.layers)
    gs.save(gs.compress(result.model.cpu()), tmp_path / "out")
    gs.load(tmp_path / "out", model=model())
