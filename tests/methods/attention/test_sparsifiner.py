"""Sparsifiner against the release's outputs, its two stages, and what it computes."""

import copy

import numpy as np
import pytest
import torch
from golden import close, is_mask, load
from torch.nn import functional as F

import gossamer as gs
from gossamer.methods.attention.sparsifiner import Maps, distillation, reconstruction
from gossamer.methods.attention.tiles import with_lists
from gossamer.ops.attention import Layout

RECORD = load("sparsifiner")["expected"]


def drawn(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


@pytest.fixture(scope="module")
def recorded():
    """The record's layer and input."""
    layer = gs.attention.Sparsifiner(16, 25, 2, rank=6, coefficients=4)
    values = {
        "qkv.weight": 0.5 * drawn(1240, (48, 16)), "project.weight": 0.3 * drawn(1241, (16, 16)),
        "project.bias": torch.zeros(16), "predictor.query.weight": drawn(1242, (4, 8)),
        "predictor.query.bias": torch.zeros(4), "predictor.key.weight": drawn(1243, (4, 8)),
        "predictor.key.bias": torch.zeros(4), "compress": 0.3 * drawn(1244, (25, 6)),
        "basis": 0.05 * drawn(1245, (25, 6)),
    }  # fmt: skip
    layer.load_state_dict(values)
    return layer, drawn(1246, (2, 25, 16))


@torch.no_grad()
def test_guess_mask_and_output_are_the_releases(recorded):
    layer, x = recorded
    query, key, _ = layer.parts(x)
    close(layer.guess(query, key), RECORD["approx_attn"])
    mask = layer.choose(query, key)
    assert is_mask(mask, RECORD["attn_mask"])
    assert mask.sum(-1)[0, 0].tolist() == RECORD["kept_per_row"]["values"]
    close(layer(x), RECORD["output"])


@torch.no_grad()
def test_the_first_stage_is_the_releases(recorded):
    layer, x = recorded
    maps = []
    close(layer(x, maps), RECORD["stage1_output_dense"])
    close(maps[0].guess, RECORD["stage1_approx_attn"])
    assert maps[0].dense.shape == maps[0].guess.shape
    torch.testing.assert_close(maps[0].dense.sum(-1), torch.ones(2, 2, 24))


def test_only_the_first_stage_teaches_the_predictor():
    torch.manual_seed(0)
    layer = gs.attention.Sparsifiner(16, 13, 2)
    named = ("predictor.query.weight", "predictor.key.weight", "compress", "basis")
    x = torch.randn(2, 13, 16)
    teacher = [Maps(torch.zeros(0), torch.rand(2, 2, 12, 13))]
    layer(x).square().sum().backward()
    assert all(layer.get_parameter(name).grad is None for name in named)
    maps = []
    layer(x, maps)
    loss = reconstruction(maps, teacher)
    expected = 0.01 * (maps[0].guess - teacher[0].dense).square().sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(layer.get_parameter(name).grad.any() for name in named)
    with pytest.raises(gs.UsageError, match="maps of 1 layers, and of 2"):
        reconstruction(maps, teacher * 2)


def test_the_stages_guess_with_different_bases():
    torch.manual_seed(0)
    layer = gs.attention.Sparsifiner(16, 13, 2, coefficients=1)
    query, key, _ = layer.parts(torch.randn(1, 13, 16))
    first, later = layer.guess(query, key, first=True), layer.guess(query, key)
    assert (first < 0).any() and not (later < 0).any()
    with torch.no_grad():
        layer.basis.neg_()
        torch.testing.assert_close(layer.guess(query, key, first=True), -first)
        torch.testing.assert_close(layer.guess(query, key), later)
        layer.basis.copy_(torch.full_like(layer.basis, 0.02))
        assert not layer.guess(query, key).any(), "up to the threshold is 0"


def test_pairs_that_are_not_chosen_are_never_read():
    torch.manual_seed(0)
    layer = gs.attention.Sparsifiner(16, 13, 2).eval()
    query, key, _ = layer.parts(torch.randn(1, 13, 16))
    mask = layer.choose(query, key)
    assert mask[:, :, 0].all() and (mask[:, :, 1:].sum(-1) == 4).all()
    layout = with_lists(Layout.empty(13, 13), mask, 1)
    assert layout.tokens.numel() == 2 * (13 + 12 * 4) and not layout.blocks.numel()
    assert layout.density() == pytest.approx(float(mask.float().mean()))


def test_multiply_adds_are_those_of_the_parts():
    torch.manual_seed(0)
    layer = gs.attention.Sparsifiner(64, 196, 4)
    with torch.no_grad():
        layer.basis.fill_(1.0)
    found = layer.multiply_adds()
    assert found["dense"] == 2 * 196 * 196 * 64
    assert found["chosen"] == 2 * (195 * 49 + 196) * 64
    head = 2 * 196 * 16 * 8 + 2 * 196 * 8 * 32 + 195 * 196 * 8
    assert found["guess"] == 4 * head
    with torch.no_grad():
        layer.basis.zero_()
    assert layer.multiply_adds()["guess"] == 4 * (head - 195 * 196 * 8)


def test_distillation_is_its_three_terms():
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 3), torch.randn(4, 3)
    tokens, others, labels = torch.randn(4, 5, 2), torch.randn(4, 5, 2), torch.tensor([0, 1, 2, 0])
    kl = (teacher.softmax(1) * (teacher.log_softmax(1) - logits.log_softmax(1))).sum() / 4
    expected = F.cross_entropy(logits, labels) + 0.5 * kl + 0.5 * (tokens - others).square().mean()
    found = distillation(logits, labels, teacher, tokens, others)
    torch.testing.assert_close(found, expected)
    again = distillation(logits, labels, logits, tokens, copy.deepcopy(tokens))
    torch.testing.assert_close(again, F.cross_entropy(logits, labels))
