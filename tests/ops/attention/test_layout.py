"""Layouts: constructors, exact densities, and what is refused."""

import pytest
import torch
from dense_attention import dense, spread, tile_of
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem

from gossamer.core.errors import UsageError
from gossamer.ops.attention import Layout, attention, bits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_density_counts_pairs(seed):
    query, _, _, layout, options = problem(seed)
    batch, heads, queries = query.shape[:3]
    given = {k: options.get(k) for k in ("causal", "query_positions", "key_positions")}
    now, then = given["query_positions"], given["key_positions"]
    now = torch.arange(layout.keys - queries, layout.keys) if now is None else now
    then = torch.arange(layout.keys) if then is None else then
    now, then = (p.reshape(1, 1, -1) if p.dim() == 1 else p for p in (now, then))
    now, then = spread(now, batch, heads), spread(then, batch, heads)
    allowed = torch.ones(batch, heads, queries, layout.keys, dtype=torch.bool)
    if given["causal"]:
        allowed = now.unsqueeze(-1) >= then.unsqueeze(-2)
    found = (tile_of(layout, batch, heads) != -1) & allowed
    total = int(allowed.sum())
    expected = int(found.sum()) / total if total else 1.0
    assert layout.density(**given) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (70, 130), (0, 5), (5, 0)])
def test_a_token_mask_comes_back_exactly(shape):
    torch.manual_seed(0)
    mask = torch.rand(1, 2, *shape) < 0.3
    mask[0, 1] = True
    layout = Layout.from_mask(mask, 16, 24)
    assert torch.equal(tile_of(layout, 1, 2) != -1, mask)
    whole = layout.tiles[int(layout.offsets[0, 1, 0]) :]
    assert (whole == -1).all()  # ragged tiles too need no mask of their own


def test_bits_come_back():
    tiles = torch.rand(5, 3, 37) < 0.5
    packed = bits.pack(tiles)
    assert packed.shape == (5, 3, 6) and torch.equal(bits.unpack(packed, 37), tiles)


def test_an_adjacency_is_a_group_of_one():
    torch.manual_seed(0)
    adjacency = torch.rand(40, 40) < 0.1
    csr = adjacency.float().to_sparse_csr()
    layout = Layout.from_csr(csr.crow_indices(), csr.col_indices(), 40)
    assert torch.equal(tile_of(layout, 1, 1)[0, 0] == -2, adjacency)
    assert layout.density() == pytest.approx(float(adjacency.float().mean()))
    parts = [torch.randn(1, 2, 40, 8) for _ in range(3)]
    found, exact = attention(*parts, layout), dense(*parts, layout)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)


def test_tokens_that_a_tile_computes_are_left_out():
    tiles = Layout.from_blocks(torch.tensor([[True, False], [False, True]]), 8, 8, 4, 4)
    layout = tiles.with_tokens(torch.tensor([0, 3, 5]), torch.tensor([1, 5, 6, 0, 7]), 4)
    assert layout.tokens.tolist() == [5, 6, 0] and layout.token_offsets.tolist() == [[[0, 2, 3]]]
    with pytest.raises(UsageError, match="only some queries of its group"):
        tiles.with_tokens(torch.tensor([0, 1]), torch.tensor([1]), 8)
    masked = Layout.from_mask(torch.eye(8) > 0, 4, 4)
    with pytest.raises(UsageError, match="masked tile"):
        masked.with_tokens(torch.tensor([0, 1, 1]), torch.tensor([1]), 4)
    with pytest.raises(UsageError, match="tokens already"):
        layout.with_tokens(torch.tensor([0, 0, 0]), torch.tensor([], dtype=torch.int32), 4)
    with pytest.raises(UsageError, match="both in a tile and in the token index"):
        Layout(
            8, 8, tiles.offsets, tiles.blocks, 4, 4,
            token_offsets=torch.tensor([[[0, 1, 1]]]), tokens=torch.tensor([1]), group=4,
        )  # fmt: skip


@pytest.mark.parametrize("isa", ["native", "reference"])
def test_groups_may_hold_several_blocks_of_queries(isa, monkeypatch):
    """As a stripe that all blocks of a group share."""
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    blocks = torch.zeros(7, 6, dtype=torch.bool)
    blocks[:, :3] = torch.rand(7, 3) < 0.5
    base = Layout.from_blocks(blocks, 100, 90, 16, 16)
    offsets, tokens = torch.tensor([0, 20, 40, 42]), torch.arange(48, 90)
    layout = base.with_tokens(offsets, tokens, 48)
    assert layout.tokens.numel() == 42
    parts = [torch.randn(1, 1, n, 8) for n in (100, 90, 90)]
    for a, b in zip(attention(*parts, layout), dense(*parts, layout), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def lists(*rows):
    counts = torch.tensor([0, *(len(row) for row in rows)])
    return counts.cumsum(0).reshape(1, 1, -1), torch.tensor([c for row in rows for c in row]).int()


def test_bad_lists_are_refused():
    good, columns = lists([0, 1], [1])
    for arguments, said in (
        ((8, 8, *lists([0, 2], [1]), 4, 4), "blocks are 0 to 1; found 2"),
        ((8, 8, *lists([-1, 1], [1]), 4, 4), "blocks are 0 to 1; found -1"),
        ((8, 8, *lists([1, 0], [1]), 4, 4), "ascend, none twice; found 1 before 0"),
        ((8, 8, *lists([0], [1, 1]), 4, 4), "ascend, none twice; found 1 before 1"),
        ((8, 8, *lists([0]), 4, 4), r"offsets of blocks are int64 \(batch, heads, 3\)"),
        ((8, 8, good.int(), columns, 4, 4), "offsets of blocks are int64"),
        ((8, 8, good[0], columns, 4, 4), "offsets of blocks are int64"),
        ((8, 8, good, columns.float(), 4, 4), "blocks are a vector of int32"),
        ((8, 8, good, columns[:2], 4, 4), "do not rise from 0 to 2"),
        ((8, 8, torch.tensor([[[0, 4, 3]]]), columns, 4, 4), "do not rise"),
        ((8, 8, torch.tensor([[[0, 1, 1]], [[2, 3, 3]]]), columns, 4, 4), "begins where the one"),
        ((8, 8, torch.zeros(0, 1, 3).long(), columns[:0], 4, 4), "at least one head"),
        ((8, 8, good, columns, 0, 4), "rows is at least 1"),
        ((-8, 8, good, columns, 4, 4), "queries is at least 0"),
        ((8, 8, good, columns, 4, 4, torch.zeros(3).int()), "come together"),
    ):
        with pytest.raises(UsageError, match=said):
            Layout(*arguments)
    masks = torch.zeros(1, 4, 2, dtype=torch.uint8)
    for tiles, mask, said in (
        (torch.tensor([0, 1, -1]).int(), masks, "mask is -1 to 0"),
        (torch.tensor([0, -2, -1]).int(), masks, "mask is -1 to 0"),
        (torch.tensor([0, 0]).int(), masks, "tiles are int32"),
        (torch.tensor([0, 0, 0]).int(), masks[:, :3], "masks are uint8"),
    ):
        with pytest.raises(UsageError, match=said):
            Layout(8, 8, good, columns, 4, 4, tiles, mask)


def test_bad_constructors():
    ones = torch.ones(2, 2) > 0
    with pytest.raises(UsageError, match="9 queries and 8 keys make"):
        Layout.from_blocks(ones, 9, 8, 4, 4)
    with pytest.raises(UsageError, match="bool with 2 to 4 axes"):
        Layout.from_mask(torch.ones(2, 2))
    with pytest.raises(UsageError, match="neither divide blocks of 4"):
        Layout.from_blocks(ones, 8, 8, 4, 4).with_tokens(
            torch.tensor([0, 0, 0, 0]), torch.tensor([], dtype=torch.int32), 3
        )
    with pytest.raises(UsageError, match="token lists for"):
        Layout.from_blocks(ones, 8, 8, 4, 4).with_tokens(
            torch.zeros(1, 2, 3).long(), torch.tensor([], dtype=torch.int32), 4
        )
