"""SeerAttention against the release's outputs, and what its gate learns."""

import numpy as np
import pytest
import torch
from golden import close, is_mask, load
from maps import normal_call

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.engine.inputs.attend import run_layout
from gossamer.engine.inputs.counting import full_layout, pairs, possible_pairs
from gossamer.methods.attention.seer import block_maxima, distillation, features, masked
from gossamer.methods.attention.tiles import from_blocks
from gossamer.nn.attention_gate import BlockGate, rotated
from gossamer.ops.select import keep

RECORD = load("seer_attention")["expected"]


def drawn(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


@pytest.fixture(scope="module")
def gates():
    """(logits, softmax) of the record's gate."""
    query, key = (
        drawn(seed, (1, 64, heads, 16)).transpose(1, 2) for seed, heads in ((1312, 4), (1313, 2))
    )
    gate = BlockGate(4, 2, 16, 12, torch.Generator())
    with torch.no_grad():
        gate.query.copy_(0.3 * drawn(1310, (4, 16, 12)))
        gate.key.copy_(0.3 * drawn(1311, (2, 48, 12)))
        call = AttentionCall(query, key, key, 1.0, True)
        seen = features(call, 8)
        logits = masked(gate(seen["query"], seen["key"], 8), call.possible_blocks(8, 8))
    return logits, logits.softmax(-1), call, gate


def test_gates_are_the_releases(gates):
    logits, softmax, call, gate = gates
    close(softmax, RECORD["gate_softmax"])
    close(logits.tril(), RECORD["gate_logits_lower_triangle"])
    method = gs.attention.SeerAttention(block=8, width=12, gates={0: gate})
    torch.testing.assert_close(method.score(call), softmax)


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_masks_by_density_are_the_releases(gates, density):
    _, softmax, call, gate = gates
    method = gs.attention.SeerAttention(density=density, block=8, width=12, gates={0: gate})
    assert is_mask(method.choose(softmax).tril(), RECORD[f"mask_nz_ratio{density}"])
    found = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
    layout = method.layout(call)
    row = torch.repeat_interleave(layout.offsets.diff(dim=-1).flatten())
    found.view(32, 8)[row, layout.blocks.long()] = True
    assert is_mask(found, RECORD[f"mask_nz_ratio{density}_last2_dense"])


def test_the_mask_by_threshold_is_the_releases(gates):
    method = gs.attention.SeerAttention(threshold=0.1, block=8, width=12)
    assert is_mask(method.choose(gates[1]).tril(), RECORD["mask_threshold0.1"])


def test_target_and_loss_are_the_releases():
    call = AttentionCall(
        1.5 * drawn(1320, (1, 4, 192, 32)), drawn(1321, (1, 2, 192, 32)),
        drawn(1322, (1, 2, 192, 32)), 32**-0.5, True,
    )  # fmt: skip
    target = block_maxima(call, 32)
    close(target, RECORD["ground_truth_kernel"])
    logits = masked(drawn(1330, (1, 4, 6, 6)), torch.ones(6, 6, dtype=torch.bool).tril())
    found = float(distillation(logits, target)) / 10
    assert found == pytest.approx(RECORD["kl_mean_reduction_without_x10"], rel=1e-4)


@pytest.mark.parametrize("length", [30, 37])
def test_the_target_is_the_largest_weight_of_each_tile(length):
    call = normal_call(length, heads=4, kv_heads=2, batch=2)
    key = call.key.repeat_interleave(2, dim=1)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    logits = (call.query @ key.transpose(-1, -2) * call.scale).masked_fill(hidden, -torch.inf)
    weights = logits.softmax(-1)
    found = block_maxima(call, 8)
    for row in range(-(-length // 8)):
        wanted = torch.stack(
            [
                weights[:, :, row * 8 : row * 8 + 8, c * 8 : c * 8 + 8].amax((2, 3))
                for c in range(-(-length // 8))
            ],
            dim=-1,
        )
        torch.testing.assert_close(found[:, :, row], wanted / wanted.sum(-1, keepdim=True))


def test_rotation_is_undone():
    x, places = torch.randn(2, 3, 7, 16), torch.arange(7)
    for size in (8, 4):
        frequencies = torch.rand(size)
        turned = rotated(x, places, frequencies)
        assert not torch.allclose(turned, x)
        torch.testing.assert_close(rotated(turned, places, -frequencies), x)


def needles(seed, tokens=512, width=16):
    """Queries look for keys of their own kind, of which each block of keys has one hot cell."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    kinds = torch.nn.functional.normalize(
        torch.randn(6, width, generator=torch.Generator().manual_seed(9)), dim=-1
    )
    query, key = 0.4 * normal(2, tokens, width), 0.7 * normal(1, tokens, width)
    for head in range(2):
        kind = torch.randint(6, (tokens // 16,), generator=generator)
        query[head] += 5 * kinds[kind].repeat_interleave(16, dim=0)
    hot = torch.arange(0, tokens, 16) + torch.randint(16, (tokens // 16,), generator=generator)
    key[0, hot] += 6 * kinds[torch.randint(6, (tokens // 16,), generator=generator)]
    value = normal(1, tokens, width)
    return AttentionCall(query[None], key[None], value[None], width**-0.5, True)


def test_a_trained_gate_lies_between_mean_pooled_blocks_and_the_target():
    method = gs.attention.SeerAttention(density=0.3, block=16, width=16, steps=300, rate=1e-2)
    method = method.fitted({0: [method.observe(needles(seed)) for seed in range(12)]})
    recalls = {"gate": [], "means": [], "target": []}
    for seed in range(100, 104):
        call = needles(seed)
        dense = run_layout(call, full_layout(call, 16))[1]
        found = method.layout(call)
        density = pairs(found, call) / possible_pairs(call)
        layouts = {"gate": found}
        means = gs.attention.BlockSparse(block=16, density=density)
        layouts["means"] = means.layout(call)
        budget = gs.TopK(max(1, int((1 - 0.7**0.5) * 32)))
        best = keep(block_maxima(call, 16), budget) & call.possible_blocks(16, 16)
        best[:, :, -2:] = call.possible_blocks(16, 16)[-2:]
        layouts["target"] = from_blocks(best, call, 16)
        for name, layout in layouts.items():
            lse = run_layout(call, layout)[1]
            recalls[name].append(float((lse - dense).exp().mean()))
    means, gate, target = (np.mean(recalls[name]) for name in ("means", "gate", "target"))
    assert means + 0.03 < gate < target, (means, gate, target)


def test_calibration_takes_a_model_and_texts_and_the_gates_serve_it(tiny_llama):
    model = tiny_llama()
    texts = [
        torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    method = gs.attention.SeerAttention(density=0.3, block=8, width=8, steps=20)
    found = gs.calibrate_attention(model, method, texts)
    again = gs.calibrate_attention(model, method, texts)
    assert sorted(found.gates) == [0, 1] and not method.gates
    for layer, gate in found.gates.items():
        assert torch.equal(gate.query, again.gates[layer].query)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with gs.sparse_attention(model, found, dense_below=0) as run, torch.no_grad():
        model(texts[0])
    assert run.result.density < 0.7 and run.result.calls == 2


def test_features_of_a_model_are_those_before_its_rotation(tiny_llama):
    model, seen = tiny_llama(layers=1), []

    class Watch:
        card = gs.attention.SeerAttention.card

        def layout(self, call):
            seen.append(features(call, 8))
            return full_layout(call)

    ids = torch.arange(40).unsqueeze(0)
    with gs.sparse_attention(model, Watch(), dense_below=0), torch.no_grad():
        model(ids)
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(ids))
        query = layer.self_attn.q_proj(hidden).view(1, 40, 4, 16).transpose(1, 2)
    torch.testing.assert_close(
        seen[0]["query"], query.unflatten(2, (5, 8)).mean(3), rtol=1e-3, atol=1e-5
    )


def test_missing_and_foreign_gates_are_named(tiny_llama):
    call = normal_call(40)
    with pytest.raises(gs.UsageError, match="calibrate_attention"):
        gs.attention.SeerAttention().layout(call)
    gate = BlockGate(4, 2, 16, 8, torch.Generator())
    with pytest.raises(gs.UsageError, match="another model"):
        gs.attention.SeerAttention(gates={0: gate}).layout(call)
    with pytest.raises(gs.UsageError, match="even"):
        gs.attention.SeerAttention(width=7)
    with pytest.raises(gs.UsageError, match="learns nothing"):
        gs.calibrate_attention(tiny_llama(), "blocksparse", [torch.zeros(1, 9).long()])
