"""Random scores lie where the weight does, and are the same there."""

import pytest
import torch

import gossamer as gs
from gossamer.core.stats import LayerStats


def test_scores_follow_the_weight_to_its_device():
    method, stats = gs.weights.Random(seed=3), LayerStats("layer", 0)
    assert method.score(torch.empty(5, 7, device="meta"), stats).device.type == "meta"
    assert method.score(torch.empty(5, 7), stats).device.type == "cpu"


@pytest.mark.gpu
def test_scores_are_the_same_on_every_device():
    method, stats = gs.weights.Random(seed=3), LayerStats("layer", 0)
    weight = torch.randn(64, 48)
    there = method.score(weight.cuda(), stats)
    assert there.is_cuda
    assert torch.equal(there.cpu(), method.score(weight, stats))
    model = torch.nn.Sequential(torch.nn.Linear(48, 64)).cuda()
    assert gs.prune(model, gs.weights.Random(), density=0.25, include=("*",)).density == 0.25
