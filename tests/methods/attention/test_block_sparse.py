"""BlockSparse against the card, written out block by block."""

import pytest
import torch
from maps import attended, normal_call

import gossamer as gs


def by_the_card(call, size, count):
    """bool (batch, heads, query blocks, key blocks): mean-pooled products, ranked by hand."""
    batch, heads = call.query.shape[:2]
    blocks = -(-call.queries // size)
    kept = torch.zeros(batch, heads, blocks, -(-call.keys // size), dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            key = call.key[b, h // call.shared]
            for row in range(blocks):
                query = call.query[b, h, row * size : (row + 1) * size].mean(0)
                scores = {
                    c: float(query @ key[c * size : (c + 1) * size].mean(0)) for c in range(row + 1)
                }
                for c in (row, row - 1, 0):
                    if c in scores:
                        scores[c] = float("inf")
                best = sorted(scores, key=lambda c: (-scores[c], c))[: max(count, 1)]
                forced = [c for c, score in scores.items() if score == float("inf")]
                kept[b, h, row, list({*best, *forced})] = True
    return kept


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("count", [1, 3, 4, 100])
def test_blocks_are_those_of_the_card(length, count):
    call = normal_call(length, heads=4, kv_heads=2, batch=2)
    layout = gs.attention.BlockSparse(blocks=count, block=8).layout(call)
    wanted = by_the_card(call, 8, count)
    whole = wanted.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :length, :length].tril()
    assert torch.equal(attended(layout, call), whole)


def test_encoders_take_the_block_behind_as_well():
    call = normal_call(64)
    both = type(call)(call.query, call.key, call.value, call.scale, causal=False)
    mask = attended(gs.attention.BlockSparse(blocks=1, block=8).layout(both), both)[0, 0]
    assert mask[8, 16:24].all() and mask[8, :24].all() and not mask[8, 24:].any()
