"""PSA: levels as the release gives them, the bias of means, and when pooling helps."""

import hashlib

import golden
import numpy as np
import pytest
import torch

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import DenoisingStep
from gossamer.methods.attention.psa import over_means, pyramid, similarity_caps
from gossamer.ops.attention import attention

RECORD = golden.load("psa")["expected"]
BOUNDS = (0.4, 0.5, 0.6, 0.8)
QUOTAS = (0.10, 0.15, 0.15, 0.35)


def sn(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scores():
    found = torch.tensor(2 * sn(1370, (1, 2, 4, 40))).double().softmax(-1).float()
    wanted = RECORD["attention_block_scores_row0"]["values"]
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(wanted), rtol=1e-4, atol=1e-9)
    return found


def is_recorded(levels, name):
    want, density = RECORD[f"{name}_levels"], RECORD[f"{name}_density"]
    flat = levels.numpy().astype("<i8")
    assert flat.ravel()[:12].tolist() == want["first12"] and flat.sum() == want["sum"]
    assert hashlib.sha256(flat.tobytes()).hexdigest() == want["sha256_int64_le"]
    share = torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0).mean()
    assert float(share) == pytest.approx(density, abs=1e-5)


@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize(
    ("by", "shares", "name"), [("mass", BOUNDS, "thresholdbound"), ("quota", QUOTAS, "topk")]
)
def test_levels_are_those_of_the_release(by, shares, name, block):
    method = gs.attention.PSA(by, shares, rows=block, block=block, tile=32)
    is_recorded(method.levels(scores()), f"{name}_{block}_32")


def test_text_is_always_whole():
    method = gs.attention.PSA("mass", BOUNDS, rows=128, block=128)
    levels = method.levels(scores())
    levels[..., -1:] = 1  # 100 tokens of text are in the last block of 128
    is_recorded(levels, "thresholdbound_128_32_text100")
    # And that is what `choose` does, here with text in the last of four blocks.
    call = smooth(256)
    grid = gs.TokenGrid(3, 8, 8, text=64, text_first=False)
    found = gs.attention.PSA(rows=64, block=64).choose(call, DenoisingStep(9, 10, "", grid))
    assert (found[..., -1] == 1).all() and not (found[..., :-1] == 1).all()


def test_caps_and_biases_are_those_of_the_release():
    key = torch.tensor(0.25 * sn(1371, (1, 2, 128, 16))).cumsum(2)
    found = similarity_caps(key, 32, (0.7, 0.65, 0.6))
    assert found.tolist() == RECORD["similarity_cap_block32"]["values"]
    noise = torch.tensor(sn(1, (1, 2, 128, 16)))
    assert (similarity_caps(noise, 32, (0.7, 0.65, 0.6)) == 1).all()
    # Identical keys: a mean stands for as many, so the log-sum-exp is that of the whole keys.
    call = smooth(64)
    same = AttentionCall(
        call.query, call.key[:, :, :1].expand(-1, -1, 64, -1), call.value, 0.25, False
    )
    for level in (2, 4, 8):
        mask = torch.ones(1, 2, 1, 1, dtype=torch.bool)
        (_, lse), _ = over_means(same, mask, level, 64, 64 // level)
        alone = (same.query * same.key[:, :, :1]).sum(-1) * 0.25
        assert float((lse - alone).mean()) == pytest.approx(np.log(64), abs=1e-5)
        assert np.log(level) == pytest.approx(
            RECORD["pooled_logit_bias"][f"level{level}"], abs=1e-5
        )


def smooth(tokens, seed=0, noise=False, width=16):
    """Queries of normal numbers, and keys and values that change slowly, or not."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, tokens, width, generator=generator) for _ in range(3))
    if not noise:
        knots = tokens // 64 + 2
        at = torch.arange(tokens) / 64
        left = at.long()
        share = (at - left).unsqueeze(-1)
        key, value = (
            2
            * ((1 - share) * x[:, :, :knots][:, :, left] + share * x[:, :, :knots][:, :, left + 1])
            for x in (key, value)
        )
    return AttentionCall(query, key, value, width**-0.5, False)


def errors(call, coarse=8):
    """The relative error with half the blocks over means of 8: with the bias, without, skipped."""
    blocks = call.keys // 32
    levels = torch.ones(1, 2, blocks, blocks, dtype=torch.long)
    levels[..., ::2] = coarse
    exact = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)

    def off(output):
        return float((output - exact).norm() / exact.norm())

    with_bias = pyramid(call, levels, 32, 32)[0][0]
    plain = call_without_bias(call, levels, coarse)
    skipped = pyramid(call, levels * (levels == 1), 32, 32)[0][0]
    return off(with_bias), off(plain), off(skipped)


def call_without_bias(call, levels, coarse):
    from gossamer.methods.attention.tiles import pooled
    from gossamer.ops.attention import Layout, merge

    whole = Layout.from_blocks(levels == 1, call.queries, call.keys, 32, 32)
    key, value = pooled(call.key, coarse), pooled(call.value, coarse)
    means = Layout.from_blocks(levels == coarse, call.queries, key.shape[2], 32, 32 // coarse)
    parts = (
        attention(call.query, call.key, call.value, whole, scale=call.scale),
        attention(call.query, key, value, means, scale=call.scale),
    )
    return merge(*parts)[0]


def test_smooth_keys_need_the_bias_and_noise_gains_nothing():
    biased, plain, skipped = errors(smooth(512))
    assert biased < 0.02 and plain > 20 * biased and skipped > 20 * biased
    sharp = smooth(512, noise=True)
    sharp = AttentionCall(sharp.query, 4 * sharp.key, sharp.value, sharp.scale, False)
    biased, _, skipped = errors(sharp)
    assert biased > 0.95 * skipped  # nothing is like its neighbours


def test_a_ragged_end_is_counted_for_what_it_is():
    call = smooth(509)
    levels = torch.full((1, 2, 16, 16), 8)
    levels[..., 0] = 1
    _, pairs = pyramid(call, levels, 32, 32)
    assert pairs == 2 * 509 * (32 + -(-509 // 8) - 4)
    same = AttentionCall(call.query, call.key * 0, call.value, call.scale, False)
    (_, lse), _ = pyramid(same, levels, 32, 32)
    torch.testing.assert_close(lse, torch.full_like(lse, np.log(509)))


def test_pooling_needs_near_tokens_together():
    """Along a Hilbert curve neighbours are near in space; row after row they are less so."""
    grid = gs.TokenGrid(4, 16, 16)
    frame, row, column = torch.meshgrid(*(torch.arange(n) for n in (4, 16, 16)), indexing="ij")
    wave = torch.stack([(frame / 4), (row / 6), (column / 6)], -1).reshape(1, 1, -1, 3)
    key = torch.cat([wave.sin(), wave.cos()], -1).expand(-1, 2, -1, -1) * 2
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, grid.tokens, 6, generator=generator)
    call = AttentionCall(query, key, key, 1.0, False)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, key, scale=1.0)
    off = {}
    for order in ("hilbert", "none"):
        method = gs.attention.PSA(shares=(0.1, 0.1, 0.1, 1.0), rows=64, block=64, order=order)
        found = method.attend(call, DenoisingStep(9, 10, "", grid), None)
        off[order] = float((found.output - exact).norm() / exact.norm())
    assert off["hilbert"] < off["none"]
