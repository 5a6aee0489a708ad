"""Decoding over listed keys and pages, against dense masked attention in float64."""

import copy
import random

import pytest
import torch
from dense_attention import dense
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.attention import Layout, attention, decode, room

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]


def case(seed, dtype):
    """(query, key, value, index, options) and the same as a layout."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, shared = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 4, 7])
    queries, keys, page = rng.choice([1, 1, 3]), rng.choice([1, 70, 1500]), rng.choice([1, 16, 20])
    width, value_width = rng.choice([5, 16, 64, 128]), rng.choice([3, 16, 40, 64, 128])
    heads, pages = kv_heads * shared, -(-keys // page)
    query = torch.randn(batch, heads, queries, width, generator=generator).to(dtype)
    cache = torch.full((2, batch, kv_heads, keys + 9, 128), torch.nan).to(dtype)
    key, value = cache[0, :, :, :keys, :width], cache[1, :, :, :keys, :value_width]
    key.normal_(generator=generator)
    value.normal_(generator=generator)
    count = rng.randrange(pages + 1)
    order = [torch.randperm(pages, generator=generator)[:count] for _ in range(batch * kv_heads)]
    index = torch.stack(order).reshape(batch, kv_heads, count)
    index[torch.rand(index.shape, generator=generator) < 0.2] = -1
    mask = torch.zeros(batch, kv_heads, 1, pages, dtype=torch.bool)
    for place in (index >= 0).nonzero().tolist():
        mask[place[0], place[1], 0, index[tuple(place)]] = True
    for tensor in (key, value):  # what is not listed is not read
        left = ~mask.repeat_interleave(page, 3)[..., 0, :keys]
        tensor[left] = torch.nan
    layout = Layout.from_blocks(mask, queries, keys, rows=4, columns=page)
    options = {"causal": rng.random() < 0.5}
    if options["causal"]:
        options["query_positions"] = torch.randint(keys, (1, heads, queries), generator=generator)
    if rng.random() < 0.5:
        bias = torch.randn(1, rng.choice([1, kv_heads, heads]), keys, generator=generator)
        bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
        options["key_bias"] = bias
    return (query, key, value, index), layout, {"page": page}, options


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_decoding_equals_dense_masked_attention(isa, seed, dtype):
    inputs, layout, page, options = case(seed, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        output, lse = decode(*inputs, **page, **options)
    query, key, value, _ = inputs
    exact = dense(query, torch.nan_to_num(key), torch.nan_to_num(value), layout, **options)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert output.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, 4, 1, 64),
        torch.randn(1, 2, 6000, 64),
        torch.randn(1, 2, 6000, 64),
    )
    index = torch.stack([torch.randperm(6000)[:3000] for _ in range(2)])[None]
    one, *others = over_threads(lambda: decode(query, key, value, index))
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_one_list_serves_layouts_and_decoding():
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, 4, 1, 32),
        torch.randn(1, 2, 100, 32),
        torch.randn(1, 2, 100, 32),
    )
    index = torch.tensor([[[5, 1, 3], [0, 6, 2]]])
    mask = torch.zeros(1, 2, 1, 7, dtype=torch.bool).scatter_(3, index.unsqueeze(2), True)
    layout = Layout.from_blocks(mask, 1, 100, 1, 16)
    found = decode(query, key, value, index, page=16, causal=True)
    for a, b in zip(found, attention(query, key, value, layout, causal=True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ISAS)
def test_bad_lists(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    query, key, value = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    for index, page, said in (
        ([[[0, 3]]], 16, "index 3 is none of 0 to 2"),
        ([[[-2]]], 1, "index -2 is none of 0 to 39"),
        ([[[4, 2, 4]]], 1, "index 4 occurs twice"),
        ([[[2.0]]], 1, "index is int64"),
        ([[[1], [2]]], 1, r"index is int64 \(1, 1, count\)"),
        ([[[0]]], 0, "at least 1 key"),
    ):
        with pytest.raises(UsageError, match=said):
            decode(query, key, value, torch.tensor(index), page=page)
    with pytest.raises(UsageError, match="no gradients"):
        decode(query.requires_grad_(), key, value, torch.zeros(1, 1, 1, dtype=torch.int64))


def test_no_keys_give_nothing():
    query = torch.randn(1, 2, 1, 4)
    for keys, index in ((0, torch.zeros(1, 1, 0)), (9, torch.full((1, 1, 3), -1))):
        cache = torch.randn(1, 1, keys, 4)
        output, lse = decode(query, cache, cache, index.long())
        assert not output.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_holds_each_key_beside_its_value_and_decodes_alike(dtype):
    torch.manual_seed(0)
    for tokens in (10, 9000):  # of bytes for a large page, and of fewer
        key, value = room((1, 2, tokens), 64, 40, dtype)
        assert value.data_ptr() - key.data_ptr() == 64 * dtype.itemsize
        assert key.stride() == value.stride() == (2 * tokens * 104, tokens * 104, 104, 1)
        key.normal_()
        value.normal_()
        query = torch.randn(1, 4, 1, 64).to(dtype)
        index = torch.stack([torch.randperm(tokens)[:7] for _ in range(2)])[None]
        plain = decode(query, key.contiguous(), value.contiguous(), index)
        assert all(
            torch.equal(a, b) for a, b in zip(decode(query, key, value, index), plain, strict=True)
        )
        again = copy.deepcopy(key)
        assert torch.equal(again, key) and again.data_ptr() != key.data_ptr()


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_a_weight_of_0_meets_no_infinite_value(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for dtype in (torch.float32, torch.bfloat16):
        query, key = torch.full((1, 1, 1, 32), 40.0), torch.ones(1, 1, 5, 32)
        value = torch.ones(1, 1, 5, 64)
        key[0, 0, 2], value[0, 0, 2] = -40, torch.inf
        output, _ = decode(*(x.to(dtype) for x in (query, key, value)), torch.arange(5)[None, None])
        assert torch.equal(output, torch.ones_like(output))
