"""MaskLLM against the authors' own figures, and that it learns a better mask than magnitude."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.methods.weights.maskllm import SampledMask, prior_shift
from gossamer.ops.select import select

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/maskllm.json").read_text())["expected"]


def drawn(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


@pytest.fixture
def golden():
    weight = drawn(201, (8, 16))
    prior = select(weight.abs(), gs.NM(2, 4), 0.5).mask
    info = LayerInfo("w", (8, 16), None, weight)
    mask = SampledMask(gs.weights.MaskLLM(), info, prior, torch.Generator())
    logits = drawn(202, (32, 6)) * np.float32(0.01)
    uniform = np.random.default_rng(203).random((32, 6)).astype("float32")
    with torch.no_grad():
        mask.logits.copy_(logits.t() + prior_shift(logits.t(), mask.candidates, prior, 3.0))
        mask.noise.copy_(-torch.log(-torch.log(torch.from_numpy(uniform))).t())
    return mask, weight


def test_prior_schedules_and_soft_masks_are_the_authors(golden):
    mask, weight = golden
    want = torch.tensor(GOLDEN["logits_after_prior"]["values"])
    torch.testing.assert_close(mask.logits.detach().t(), want, rtol=1e-4, atol=1e-6)
    method = mask.method
    for number in (0, 50, 90, 100):
        temperature, scale = GOLDEN[f"temperature_scale_iter{number}"]["values"]
        pairs = [(method.temperature, temperature), (method.scale, scale)]
        for (first, last), value in pairs:
            assert first + (last - first) * number / 100 == pytest.approx(value)
        mask.now.copy_(torch.tensor([temperature, scale, 1.0]))
        soft = mask.soft().reshape(8, 16)
        want = torch.tensor(GOLDEN[f"soft_mask_iter{number}"]["values"])
        torch.testing.assert_close(soft.detach(), want, rtol=2e-3, atol=1e-5)
        norm = GOLDEN[f"masked_weight_sqnorm_iter{number}"]
        assert -float(mask.loss(weight).detach()) == pytest.approx(norm, rel=1e-4)
        if number == 50:
            (soft * drawn(204, (8, 16))).sum().backward()
            want = torch.tensor(GOLDEN["grad_logits_iter50_of_sum_R_mask"]["values"])
            torch.testing.assert_close(mask.logits.grad.t(), want, rtol=2e-3, atol=1e-3)
    kept = mask.finish(weight).mask
    assert kept.int().tolist() == GOLDEN["export_mask"]["values"]


def test_it_finds_a_better_mask_than_magnitude():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 8, bias=False))
    x = torch.randn(256, 32) * torch.rand(32).mul(4).exp()
    want = layer(x).detach()
    before = layer[0].weight.detach().clone()

    def error(mask):
        return float((x @ (before * mask).t() - want).square().mean())

    start = error(select(before.abs(), gs.NM(2, 4), 0.5).mask)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    method = gs.weights.MaskLLM(rate=0.02)
    with gs.sparse_training(layer, optimizer, method, total_steps=150, include=("0",)) as run:
        for _ in range(150):
            optimizer.zero_grad()
            ((layer(x) - want).square().mean() / start).backward()
            optimizer.step()
        assert run.gap < 0.05
    assert error(layer[0].weight != 0) < 0.5 * start
    assert torch.equal(layer[0].weight, before * run.supports["0"].mask)


def test_the_prior_of_a_pruned_copy_is_taken_and_checked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(1)
    mask = select(torch.rand(8, 16, generator=generator), gs.NM(2, 4), 0.5)
    method = gs.weights.MaskLLM(prior={"0": mask}, strength=20.0)
    with gs.sparse_training(
        model, optimizer, method, total_steps=9, include=("0",), exclude=("1",)
    ) as run:
        assert torch.equal(run.supports["0"].mask, mask.mask)
    with (
        pytest.raises(gs.UsageError, match="1: prior="),
        gs.sparse_training(model, optimizer, method, total_steps=9, include=("0", "1")),
    ):
        pass
    with pytest.raises(gs.UsageError, match="12870 patterns"):
        gs.weights.MaskLLM(gs.NM(8, 16))
