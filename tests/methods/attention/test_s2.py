"""S2-Attention: the rule pair by pair, shards that make a whole, and what a cache may drop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import attended, normal_call

import gossamer as gs
from gossamer.core.attention import AttentionCall, CachedKeys

S2 = gs.attention.S2Attention


def mask_of(method, length, heads, past=0, layer=0, shared=1):
    """bool (kv heads, queries, keys) of what is attended."""
    call = normal_call(length, past=past, heads=heads * shared, kv_heads=heads)
    call = AttentionCall(call.query, call.key, call.value, 1.0, True, layer, 4)
    return attended(method.layout(call), call)[0]


@pytest.mark.parametrize(("heads", "stride"), [(1, 1), (2, 4), (4, 8), (8, 8), (6, 4), (3, 7)])
def test_the_rule_pair_by_pair(heads, stride):
    method = S2(local=3, stride=stride, block=4, offset=1, dense_every=2)  # the second layer
    found = mask_of(method, 75, heads)
    step = max(1, stride // heads)
    for head in range(heads):
        for query in range(75):
            for key in range(75):
                r, c = query // 4, key // 4
                near = r - c < 3
                stripe = (c + head * step + 1) % stride == 0
                assert bool(found[head, query, key]) == (key <= query and (near or stripe))


def shards(method, length, heads):
    """bool (heads, query blocks, key blocks) of the tiles in a layout."""
    layout = method.layout(normal_call(length, heads=heads, kv_heads=heads))
    lists = torch.repeat_interleave(layout.offsets.diff(dim=-1).flatten())
    found = torch.zeros(heads * layout.query_blocks, layout.key_blocks, dtype=torch.bool)
    found[lists, layout.blocks.long()] = True
    return found.unflatten(0, (heads, -1))


@given(
    heads=st.integers(1, 12), stride=st.integers(1, 16), local=st.integers(1, 4),
    offset=st.integers(0, 20), blocks=st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_all_heads_together_see_everything_or_the_layout_is_refused(
    heads, stride, local, offset, blocks
):
    whole = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    method = S2(local, stride, 2, offset)
    if heads >= stride:
        assert torch.equal(shards(method, 2 * blocks, heads).any(0), whole)
        return
    with pytest.raises(gs.UsageError, match=f"take a stride of {heads} at most"):
        method.layout(normal_call(2 * blocks, heads=heads, kv_heads=heads))
    # Refused with reason: in a long text some blocks are on no head's stripe.
    hybrid = shards(S2(local, stride, 2, offset, dense_every=2), 2 * 60, heads)
    assert not torch.equal(hybrid.any(0), torch.ones(60, 60, dtype=torch.bool).tril())


def test_query_heads_that_share_keys_share_a_pattern():
    found = mask_of(S2(local=2, stride=2, block=4), 70, 2, shared=3)
    assert torch.equal(found[0:3], found[0:1].expand(3, -1, -1))
    assert torch.equal(found[3:6], found[3:4].expand(3, -1, -1))
    assert not torch.equal(found[0], found[3])


def test_dense_heads_come_last_and_dense_layers_take_turns():
    whole = torch.ones(60, 60, dtype=torch.bool).tril()
    found = mask_of(S2(local=1, stride=3, block=4, dense_heads=1), 60, 4)
    assert torch.equal(found[3], whole) and not any(torch.equal(x, whole) for x in found[:3])
    # The stripes are shared out among the three others.
    assert torch.equal(found[:3].any(0), whole)
    for layer in range(4):
        found = mask_of(S2(local=1, stride=4, block=4, dense_every=2), 60, 4, layer=layer)
        assert bool(found.eq(whole).all()) == (layer % 2 == 1)
    with pytest.raises(gs.UsageError, match="5 dense heads"):
        mask_of(S2(dense_heads=5), 20, 4)


@pytest.mark.parametrize("length", [40, 61, 64])
def test_no_key_that_a_cache_drops_is_ever_needed_again(length):
    method = S2(local=3, stride=3, block=8, dense_heads=1)
    call = normal_call(length, heads=4, kv_heads=4)
    places = torch.arange(length).expand(4, -1)
    kept = method.kept_keys(
        CachedKeys(call.query[0][:, :0], call.key[0], call.value[0], places, length, 1.0)
    )
    assert kept.shape == (4, length) and kept[3].all() and not kept[:3].all()
    for later in range(length + 1, length + 50):
        (needed,) = mask_of(method, 1, 4, past=later - 1).transpose(0, 1)
        assert not (needed[:, :length] & ~kept).any(), later
    # What stays is needed: by the next token, or as a stripe.
    (needed,) = mask_of(method, 1, 4, past=length).transpose(0, 1)
    assert torch.equal(needed[:, :length], kept)
    # Rows that are no keys are not kept, and those of an earlier eviction go by their places.
    some = torch.tensor([1, 9, 30, 39, -1]).expand(4, -1)
    rows = call.key[0][:, :5]
    found = method.kept_keys(CachedKeys(call.query[0][:, :0], rows, rows, some, length, 1.0))
    assert torch.equal(found[:, :4], kept[:, some[0, :4]]) and not found[:, 4].any()


def test_a_model_learns_through_the_pattern(tiny_llama):
    model = tiny_llama(layers=2).train()
    model.config.attention_dropout = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    losses = []
    with gs.sparse_attention(
        model, S2(local=2, stride=2, block=8, dense_every=2), dense_below=0
    ) as run:
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert run.result.layers[0].density < 0.8 and run.result.layers[1].density == 1.0


@pytest.mark.parametrize("bad", [{"local": 0}, {"stride": 0}, {"block": -1}, {"offset": -1}])
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        S2(**bad)
