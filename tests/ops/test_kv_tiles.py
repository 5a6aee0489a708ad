"""Tiled keys and values: against their definition, and attention over them in float64."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.budget import TopK
from gossamer.core.errors import FormatError, UsageError
from gossamer.ops import _dispatch
from gossamer.ops import kv_tiles as ops
from gossamer.ops.kv_tiles import decode, pack, reference, unpack
from gossamer.ops.select import keep

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]
DTYPES = [torch.float32, torch.bfloat16]


def random_mask(rng, generator, shape):
    """Of any density, none and all included."""
    kept = rng.choice([0.0, 0.3, 0.5, 1.0])
    return torch.rand(shape, generator=generator) < kept


def poisoned(tiles):
    """The same with NaN where padding is, and behind the end."""
    places = reference._places(reference.marked(tiles.bitmaps), tiles.offsets)
    room = torch.full((tiles.entries.numel() + 64,), torch.nan, dtype=tiles.entries.dtype)
    room[places] = tiles.entries[places]
    return ops.Tiles(
        tiles.bitmaps, tiles.offsets, room[: tiles.entries.numel()], tiles.width, tiles.keys
    )


def case(seed, dtype):
    """Arguments of decode, options, and the same keys and values dense."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads = rng.choice([1, 2]), rng.choice([1, 2])
    heads, queries = kv_heads * rng.choice([1, 2, 3, 4, 7]), rng.choice([1, 1, 3, 20])
    widths = rng.choice([5, 16, 64, 80, 128]), rng.choice([3, 40, 64, 128, 130])
    blocks = rng.choice([[], [1], [3, 1], [9]])
    dense = queries + rng.choice([0, 1, 40]) if rng.random() < 0.8 else 0
    query = torch.randn(batch, heads, queries, widths[0], generator=generator).to(dtype)
    tiles, whole = ([], []), ([], [])
    for count in blocks:
        for keys in (True, False):
            shape = (batch, kv_heads, 64 * count, widths[not keys])
            x = torch.randn(shape, generator=generator).to(dtype)
            mask = random_mask(rng, generator, shape)
            tiles[not keys].append(poisoned(pack(x, mask, keys=keys)))
            whole[not keys].append(torch.where(mask, x, 0))
    tail = []
    for width in widths:
        room = torch.full((batch, kv_heads, dense + 3, width + 2), torch.nan, dtype=dtype)
        tail.append(room[:, :, :dense, :width])
        tail[-1].normal_(generator=generator)
    tokens = dense + 64 * sum(blocks)
    options = {"causal": dense > 0 and rng.random() < 0.5}
    if rng.random() < 0.5:
        shape = (rng.choice([1, batch]), rng.choice([1, kv_heads, heads]), tokens)
        options["key_bias"] = torch.randn(shape, generator=generator)
        options["key_bias"][torch.rand(shape, generator=generator) < 0.3] = -torch.inf
    both = [torch.cat([*parts, end], dim=2) for parts, end in zip(whole, tail, strict=True)]
    return (query, *tiles, *tail), options, both


def exact(query, key, value, causal=False, key_bias=None, scale=None):
    """(output, lse) by the book."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query.double() @ key.transpose(-1, -2) * scale
    if key_bias is not None:
        logits = logits + key_bias.double().repeat_interleave(
            query.shape[1] // key_bias.shape[1], 1
        ).unsqueeze(2)
    if causal:
        late = torch.ones(logits.shape[2:], dtype=torch.bool).triu(
            1 + key.shape[2] - query.shape[2]
        )
        logits = logits.masked_fill(late, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return weights @ value, lse


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_decoding_equals_dense_attention_in_one_softmax(isa, seed, dtype):
    inputs, options, both = case(seed, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        output, lse = decode(*inputs, **options)
    expected = exact(inputs[0], *both, **options)
    assert output.dtype == dtype and lse.dtype == torch.float32
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [True, False])
def test_packing_is_the_reference_bit_for_bit(isa, dtype, keys, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for batch, heads, blocks, width in [(1, 1, 1, 1), (2, 3, 2, 64), (1, 2, 3, 130), (2, 1, 0, 8)]:
        shape = (batch, heads, 64 * blocks, width)
        room = torch.randn(*shape[:3], width + 3, generator=generator).to(dtype)
        x, mask = room[..., :width], torch.rand(shape, generator=generator) < 0.4
        monkeypatch.setenv("GOSSAMER_ISA", "reference")
        expected = pack(x, mask, keys=keys)
        monkeypatch.setenv("GOSSAMER_ISA", isa)
        tiles = pack(x, mask, keys=keys)
        for a, b in zip(tiles.parts, expected.parts, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert torch.equal(unpack(tiles), x * mask)
        assert torch.equal(unpack(poisoned(tiles)), x * mask)
        assert tiles.shape == shape


def test_a_tile_is_64_neighbours_with_the_first_in_the_lowest_bit():
    x = torch.arange(64.0 * 3).reshape(1, 1, 64, 3)
    mask = torch.zeros(1, 1, 64, 3, dtype=torch.bool)
    mask[0, 0, 0, 1] = mask[0, 0, 5, 1] = mask[0, 0, 63, 2] = True
    keys, values = pack(x, mask, keys=True), pack(x, mask, keys=False)
    assert keys.bitmaps[0, 0, 0].tolist() == [0, 1 + 2**5, -(2**63)]
    assert keys.offsets[0, 0, 0].tolist() == [0, 0, 1]
    assert keys.entries.tolist() == [1, 16, *[0] * 6, 63 * 3 + 2, *[0] * 7]
    assert values.bitmaps[0, 0, 0].tolist() == [2, 0, 0, 0, 0, 2, *[0] * 57, 4]
    assert values.entries.tolist() == [1, *[0] * 7, 16, *[0] * 7, 63 * 3 + 2, *[0] * 7]


@pytest.mark.parametrize("isa", ISAS)
def test_bytes_are_those_of_the_format(isa, monkeypatch):
    """Of 16-bit dense keys and values: 12 bytes a tile, and its entries in steps of 8."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    found = {}
    for sparsity in (0.5, 0.7):
        for width in (64, 128):
            held = dense = 0
            for keys in (True, False):
                x = torch.randn(1, 2, 1024, width).to(torch.bfloat16)
                mask = keep(x.abs(), TopK(width - int(sparsity * width)))
                assert (mask.sum(-1) == width - int(sparsity * width)).all()
                tiles = pack(x, mask, keys=keys)
                counts = reference.tiled(mask, keys).sum(-1)
                assert tiles.nbytes == 12 * counts.numel() + 16 * int(((counts + 7) // 8).sum())
                held, dense = held + tiles.nbytes, dense + x.nbytes
            found[sparsity, width] = held / dense
    assert 0.61 < found[0.5, 64] < 0.63  # 32 values of each token fill their tiles exactly
    assert 0.64 < found[0.5, 128] < 0.66
    assert all(0.45 < found[0.7, width] < 0.47 for width in (64, 128))


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_left_out_may_hold_anything(isa, monkeypatch):
    """Its key and value are NaN and infinite, in tiles and among the dense tokens."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    key, value, query = (
        torch.randn(1, 1, 70, 16),
        torch.randn(1, 1, 70, 16),
        torch.randn(1, 2, 1, 16),
    )
    bias = torch.zeros(1, 1, 70)
    bias[..., [3, 66]] = -torch.inf
    expected = exact(query, key, value, key_bias=bias)
    key[..., [3, 66], :], value[..., [3, 66], :] = torch.nan, torch.inf
    every = torch.ones(1, 1, 64, 16, dtype=torch.bool)
    tiles = [pack(x[:, :, :64], every, keys=keys) for x, keys in ((key, True), (value, False))]
    tail = key[:, :, 64:], value[:, :, 64:]
    found = decode(query, tiles[:1], tiles[1:], *tail, key_bias=bias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2048, 64)
    one = lambda keys: pack(x, x > 0, keys=keys)  # noqa: E731
    query, tail = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 700, 64)

    def run():
        tiles = one(True), one(False)
        return (*tiles[0].parts, *tiles[1].parts, unpack(tiles[0]),
                *decode(query, tiles[:1], tiles[1:], tail, tail))  # fmt: skip

    first, *others = over_threads(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("keys", [True, False])
def test_batches_are_taken_in_any_order(keys):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 128, 20)
    tiles = pack(x, x > 0.5, keys=keys)
    order = torch.tensor([2, 0, 2, 1])
    taken, expected = tiles.select(order), pack(x[order], x[order] > 0.5, keys=keys)
    assert all(torch.equal(a, b) for a, b in zip(taken.parts, expected.parts, strict=True))
    assert tiles.select(order[:0]).shape == (0, 2, 128, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 64, 20).to(dtype)
    check = torch.library.opcheck
    parts = []
    for keys in (True, False):
        tiles = pack(x, x > 0, keys=keys)
        check(ops._pack, (x, x > 0, keys))
        check(ops._unpack, (*tiles.parts, 20, keys))
        parts += tiles.parts
    query, tail = torch.randn(1, 4, 1, 20).to(dtype), torch.randn(1, 2, 3, 20).to(dtype)
    for bias in (None, torch.randn(1, 1, 67)):
        check(ops._decode, (query, tail, tail, parts, bias, True, 0.2))


def test_tiles_that_contradict_themselves():
    x = torch.randn(1, 1, 64, 20)
    tiles = pack(x, x > 0, keys=False)
    bitmaps, offsets, entries = tiles.parts
    flipped, moved, spare = bitmaps.clone(), offsets.clone(), bitmaps.clone()
    flipped[..., 5] = -1
    moved[..., 7] += 1
    spare[..., 0] ^= 3 << 19  # one channel more, one that does not exist
    spare[..., 0] |= 1 << 20
    for arguments, said in (
        ((bitmaps.int(), offsets, entries, 20, False), "bitmaps are int64"),
        ((bitmaps, offsets, entries, 20, True), r"bitmaps are int64 \(batch, heads, blocks, 20\)"),
        ((bitmaps, offsets, entries, 70, False), r"blocks, 128\) for a width of 70"),
        ((bitmaps[0], offsets, entries, 20, False), "bitmaps are int64"),
        ((bitmaps, offsets.long(), entries, 20, False), "offsets are int32"),
        ((bitmaps, offsets, entries.long(), 20, False), "entries are a floating vector"),
        ((bitmaps, offsets, entries[:-8], 20, False), "but there are"),
        ((flipped, offsets, entries, 20, False), "or the offsets name other places"),
        ((bitmaps, moved, entries, 20, False), "or the offsets name other places"),
        ((bitmaps, offsets, entries, 19, False), "channels from 19 on, which do not exist"),
    ):
        with pytest.raises(FormatError, match=said):
            ops.Tiles(*arguments)


def test_bad_input():
    x, query = torch.randn(1, 2, 64, 20), torch.randn(1, 4, 1, 20)
    mask = x > 0
    for arguments, said in (
        ((x[:, :, :63], mask[:, :, :63]), "a multiple of 64 tokens"),
        ((x[0], mask[0]), "batch, heads, tokens, width"),
        ((x.long(), mask), "floating"),
        ((x, mask.int()), "the mask is bool"),
        ((x, mask[..., :5]), "the mask is bool"),
    ):
        with pytest.raises(UsageError, match=said):
            pack(*arguments, keys=True)
    keys, values, tail = (
        pack(x, mask, keys=True),
        pack(x, mask, keys=False),
        torch.randn(1, 2, 3, 20),
    )
    short = pack(x.repeat(1, 1, 2, 1), mask.repeat(1, 1, 2, 1), keys=False)
    half = pack(x.bfloat16(), mask, keys=True)
    other = pack(x[:, :1], mask[:, :1], keys=True), pack(x[:, :1], mask[:, :1], keys=False)
    for arguments, options, said in (
        ((query, [keys], [], tail, tail), {}, "1 tiles of keys, 0 of values"),
        ((query, [values], [keys], tail, tail), {}, "not of the same tokens"),
        ((query, [keys], [short], tail, tail), {}, "not of the same tokens"),
        ((query, [half], [values], tail, tail), {}, "bfloat16"),
        ((query, [other[0]], [other[1]], tail, tail), {}, r"\(1, 1, 20\).*\(1, 2, 20\)"),
        ((query[..., :5], [keys], [values], tail, tail), {}, "queries of width 5"),
        ((query, [keys], [values], tail, tail), {"key_bias": torch.zeros(1, 1, 3)}, "key_bias"),
        (
            (query.repeat(1, 1, 4, 1), [keys], [values], tail, tail),
            {"causal": True},
            "dense tokens",
        ),
        ((query.requires_grad_(), [keys], [values], tail, tail), {}, "no gradients"),
    ):
        with pytest.raises(UsageError, match=said):
            decode(*arguments, **options)
