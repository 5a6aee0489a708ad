"""VerticalSlash and FlexPrefill against the card, written out pair by pair."""

import math

import pytest
import torch
from maps import attended, logits_of, normal_call

import gossamer as gs
from gossamer.methods.attention.last_queries import by_offset, columns_and_offsets


def statistics(call, last):
    """The attention of the last queries by key and by offset, summed pair by pair."""
    weights = logits_of(call).softmax(-1)[:, :, -last:]
    columns = weights.sum(2)
    offsets = torch.zeros_like(columns)
    first = call.keys - weights.shape[2]
    for i in range(weights.shape[2]):
        for j in range(first + i + 1):
            offsets[:, :, first + i - j] += weights[:, :, i, j]
    return columns, offsets


def executed(call, columns, offsets, size):
    """The tiles that any pair at a kept offset lies in, and the kept columns, pair by pair."""
    found = columns.unsqueeze(2).repeat(1, 1, call.queries, 1)
    for i in range(call.queries):
        for o in range(i + call.past + 1):
            j = i + call.past - o
            rows = slice(i // size * size, (i // size + 1) * size)
            keys = slice(j // size * size, (j // size + 1) * size)
            some = offsets[:, :, o]
            found[:, :, rows, keys] |= some[:, :, None, None]
    return found.tril(call.past)


def highest(scores, count, fixed):
    """bool: the fixed first, then the highest, ties to the lower index; `count` for each head."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            row = scores[b, h].tolist()
            score = [math.inf if i < fixed else x for i, x in enumerate(row)]
            order = sorted(range(len(row)), key=lambda i: (-score[i], i))
            kept[b, h, order[: max(int(count[b][h]), fixed)]] = True
    return kept


@pytest.mark.parametrize("past", [0, 21])
def test_statistics_are_sums_over_pairs(past):
    call = normal_call(50, past=past, heads=2, batch=2)
    for last in (1, 13, 50, 999):
        found, wanted = columns_and_offsets(call, last), statistics(call, last)
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])


def test_offsets_of_a_small_map():
    weights = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 7.0]])
    assert by_offset(weights).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]


@pytest.mark.parametrize(("queries", "past"), [(40, 0), (45, 0), (20, 25)])
def test_vertical_slash_is_the_card(queries, past):
    call = normal_call(queries, past=past, batch=2)
    method = gs.attention.VerticalSlash(6, 7, last=10, sinks=2, near=3, block=8)
    columns, offsets = statistics(call, 10)
    kept = highest(columns, [[6, 6]] * 2, 2), highest(offsets, [[7, 7]] * 2, 3)
    assert torch.equal(attended(method.layout(call), call), executed(call, *kept, 8))


def test_more_fixed_keys_than_the_budget_are_all_kept():
    call = normal_call(40)
    method = gs.attention.VerticalSlash(1, 1, last=10, sinks=3, near=2, block=4)
    mask = attended(method.layout(call), call)
    assert mask[:, :, 20:, :3].all() and mask.diagonal(-1, 2, 3).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_flex_prefill_is_the_card(share):
    call = normal_call(45, batch=2, seed=3)
    method = gs.attention.FlexPrefill(share, least=5, last=12, sinks=2, near=3, block=8)
    columns, offsets = (x / 12 for x in statistics(call, 12))
    counts = []
    for scores in (columns, offsets):
        sums = scores.sort(-1, descending=True).values.cumsum(-1)
        counts.append([[max(int((s <= share).sum()) + 1, 5) for s in text] for text in sums])
    kept = highest(columns, counts[0], 2), highest(offsets, counts[1], 3)
    assert torch.equal(attended(method.layout(call), call), executed(call, *kept, 8))
    assert (
        share == 0.2 or len({c for text in counts[0] for c in text}) > 1
    )  # heads keep different numbers
