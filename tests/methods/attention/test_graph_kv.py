"""Graph-KV: who sees whom, where it stands, and prompts put together from kept segments."""

import pytest
import torch
from maps import attended, normal_call

import gossamer as gs
from gossamer.nn.attention_gate import rotated

GRAPH = gs.attention.GraphKV(4, (7, 9, 5), (6, 8), edges=((0, 0), (2, 0), (1, 1)))
NAMES = ["prefix"] * 4 + ["s0"] * 7 + ["s1"] * 9 + ["s2"] * 5 + ["t0"] * 6 + ["t1"] * 8 + ["q"] * 11
SEEN = {"t0": ("prefix", "s0", "s2"), "t1": ("prefix", "s1")}


@pytest.mark.parametrize(("length", "past"), [(50, 0), (30, 20), (5, 45), (22, 0)])
def test_who_sees_whom(length, past):
    found = attended(GRAPH.layout(normal_call(length, past=past)), normal_call(length, past=past))
    for row in range(length):
        place = row + past
        for key in range(length + past):
            own, other = NAMES[place], NAMES[key]
            sees = own in (other, "q") or other in SEEN.get(own, ())
            assert bool(found[0, 0, row, key]) == (sees and key <= place), (place, key)


def test_a_long_prompt_is_the_mask_of_its_segments():
    graph = gs.attention.GraphKV(10, (70, 130), (90,))
    call = normal_call(400)
    sees = graph.sees()[graph.segments(400)][:, graph.segments(400)].tril()
    assert torch.equal(attended(graph.layout(call), call), sees.expand(1, 2, -1, -1))


def test_sources_share_positions_and_so_do_targets():
    found = GRAPH.positions(50).tolist()
    assert found[:4] == [0, 1, 2, 3] and found[4:11] == list(range(4, 11))
    assert found[11:20] == list(range(4, 13)) and found[20:25] == list(range(4, 9))
    assert found[25:31] == list(range(13, 19)) and found[31:39] == list(range(13, 21))
    assert GRAPH.question == 21 and found[39:] == list(range(21, 32))
    assert GRAPH.positions(15).tolist() == found[:15]


def test_edges_default_to_all():
    graph = gs.attention.GraphKV(0, (3, 3), (2, 2))
    assert graph.sources_of(0) == graph.sources_of(1) == [0, 1]
    assert GRAPH.sources_of(0) == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_taken_out_and_put_in_are_direct_encoding(tiny_llama, dtype):
    transformers = pytest.importorskip("transformers")
    model, ids = tiny_llama().eval().to(dtype), torch.arange(20)
    segment = gs.encode_segment(model, ids)
    frequencies = model.model.rotary_emb.inv_freq.float()
    for first in (0, 7, 300):
        places, cache = first + torch.arange(20), transformers.DynamicCache()
        with torch.no_grad():
            model(ids[None], position_ids=places[None], past_key_values=cache)
        for (key, value), layer in zip(segment.layers, cache.layers, strict=True):
            assert key.dtype == torch.float32 and value.dtype == dtype
            found = rotated(key, places, frequencies)
            error = (found - layer.keys[0].float()).norm() / found.norm()
            assert error < (1e-4 if dtype == torch.float32 else 0.02)
            assert (value.float() - layer.values[0].float()).abs().max() < 0.02
    assert not torch.allclose(segment.layers[0][0], cache.layers[0].keys[0].float(), rtol=0.1)


def texts(model, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(0, 256, (length,), generator=generator)

    return ids(4), [ids(n) for n in GRAPH.sources], [ids(n) for n in GRAPH.targets], ids(11)


def joined(model, graph, prefix, sources, targets, question):
    segments = [gs.encode_segment(model, ids) for ids in sources]
    cache, first = gs.join_segments(model, graph, prefix, segments, targets)
    places = first + torch.arange(len(question)).unsqueeze(0)
    with torch.no_grad():
        return model(question.unsqueeze(0), position_ids=places, past_key_values=cache).logits


def test_a_prompt_from_kept_segments_is_the_prompt_in_one_piece(tiny_llama):
    model = tiny_llama().eval()
    prefix, sources, targets, question = texts(model)
    found = joined(model, GRAPH, prefix, sources, targets, question)
    whole = torch.cat([prefix, *sources, *targets, question]).unsqueeze(0)
    with gs.sparse_attention(model, GRAPH, dense_below=0) as run, torch.no_grad():
        given = {"position_ids": GRAPH.positions(50).unsqueeze(0)}
        wanted = model(whole, attention_mask=torch.ones_like(whole), **given).logits[:, 39:]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert run.result.density < 0.7
    with torch.no_grad():
        assert not torch.allclose(model(whole).logits[:, 39:], wanted, rtol=0.1, atol=1e-2)


def test_the_order_of_segments_does_not_matter(tiny_llama):
    model = tiny_llama().eval()
    prefix, sources, targets, question = texts(model)
    found = joined(model, GRAPH, prefix, sources, targets, question)
    other = gs.attention.GraphKV(4, (5, 7, 9), (8, 6), edges=((1, 1), (0, 1), (2, 0)))
    again = joined(model, other, prefix, [sources[i] for i in (2, 0, 1)], targets[::-1], question)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        orders = [
            model(torch.cat([prefix, *parts, *targets, question]).unsqueeze(0)).logits[:, 39:]
            for parts in (sources, sources[::-1])
        ]
    assert not torch.allclose(*orders, rtol=0.1, atol=1e-2)


def test_an_edge_carries_what_a_source_says(tiny_llama):
    model = tiny_llama().eval()
    prefix, sources, targets, _ = texts(model)
    segments = [gs.encode_segment(model, ids) for ids in sources]
    changed = [gs.encode_segment(model, sources[0].flip(0)), *segments[1:]]
    values = [
        gs.join_segments(model, GRAPH, prefix, parts, targets)[0].layers[1].values
        for parts in (segments, changed)
    ]
    same = (values[0] == values[1]).flatten(3).all(-1).all(1)[0]
    assert not same[25:31].any(), "the first target attends the first source"
    assert same[31:39].all() and same[11:25].all() and same[:4].all()


def test_the_answer_goes_on_from_the_cache(tiny_llama):
    model = tiny_llama().eval()
    prefix, sources, targets, question = texts(model)
    segments = [gs.encode_segment(model, ids) for ids in sources]
    cache, first = gs.join_segments(model, GRAPH, prefix, segments, targets)
    found = []
    with torch.no_grad():
        for place, token in enumerate(question):
            at = torch.tensor([[first + place]])
            given = {"position_ids": at, "past_key_values": cache}
            found.append(model(token.reshape(1, 1), **given).logits)
    wanted = joined(model, GRAPH, prefix, sources, targets, question)
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named(tiny_llama):
    model, small = tiny_llama().eval(), tiny_llama(layers=1).eval()
    prefix, sources, targets, _ = texts(model)
    segments = [gs.encode_segment(model, ids) for ids in sources]
    for bad in (
        lambda: gs.join_segments(model, GRAPH, prefix[:3], segments, targets),
        lambda: gs.join_segments(model, GRAPH, prefix, segments[:2], targets),
        lambda: gs.join_segments(model, GRAPH, prefix, segments, targets[::-1]),
        lambda: gs.join_segments(small, GRAPH, prefix, segments, targets),
        lambda: gs.encode_segment(model, sources[0].unsqueeze(0)),
        lambda: gs.encode_segment(model, sources[0][:0]),
        lambda: gs.encode_segment(torch.nn.Linear(2, 2), sources[0]),
        lambda: gs.attention.GraphKV(0, (3,), (2,), edges=((1, 0),)),
        lambda: gs.attention.GraphKV(0, (3,), (2,), edges=((0,),)),
        lambda: gs.attention.GraphKV(0, (3,), (2,), edges=(0, 0)),
        lambda: gs.attention.GraphKV(0, (0,)),
        lambda: gs.attention.GraphKV(-1),
        lambda: gs.attention.GraphKV(0, 5),
    ):
        with pytest.raises(gs.UsageError):
            bad()
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    with pytest.raises(gs.UsageError, match="rotary positions"):
        gs.encode_segment(transformers.BertModel(config), sources[0] % 64)
