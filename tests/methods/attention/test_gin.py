"""Graph-aware isomorphic attention: edges, messages from keys to queries, and adapted models."""

import copy
import math

import pytest
import torch

import gossamer as gs
from gossamer.methods.attention.gin import GINAttention


def test_a_sum_of_attention_above_0_14_survives_and_is_capped():
    layer = gs.attention.SparseGIN(4, 4)
    sums = torch.tensor([0.0, 0.14, 0.141, 0.5, 1.0, 3.0])
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, :, 5] = sums / 2
    found = layer.edges(attention)[0, 5]
    assert (found[:2] == 0).all() and (found[2:] > 0.6).all() and found[4] == found[5]
    assert found[3] == pytest.approx(1 / (1 + math.exp(-4)))
    assert layer.cut == 0.6 and 1 / (1 + math.exp(-10 * (0.1405 - 0.1))) == pytest.approx(
        0.6, abs=2e-3
    )


def test_messages_go_from_keys_to_queries():
    layer = gs.attention.SparseGIN(4, 4)
    with torch.no_grad():
        layer.scale.fill_(1.0)
    attention = torch.zeros(1, 1, 3, 3)
    attention[0, 0, 2, 0] = 1.0  # the last token attends the first
    x = torch.randn(1, 3, 4)
    changed = x.clone()
    changed[0, 0] += 1
    one, two = layer(x, attention), layer(changed, attention)
    assert torch.equal(one[0, 1], two[0, 1]) and not torch.equal(one[0, 2], two[0, 2])
    # The first token is told nothing by the last one, which stands behind it.
    changed = x.clone()
    changed[0, 2] += 1
    assert torch.equal(layer(changed, attention)[0, :2], one[0, :2])


def test_gin_attention_is_its_formula_and_causal():
    torch.manual_seed(0)
    layer, x = GINAttention(8, 2, 6).eval(), torch.randn(2, 7, 8)
    with torch.no_grad():
        layer.epsilon.fill_(0.4)
    outputs = []
    for head in range(2):
        at = slice(4 * head, 4 * head + 4)
        logits = layer.query(x)[..., at] @ layer.key(x)[..., at].transpose(1, 2) / 2
        shares = logits.masked_fill(torch.ones(7, 7).triu(1) > 0, -torch.inf).softmax(-1)
        outputs.append(layer.network(0.4 * x[..., at] + shares @ x[..., at]))
    torch.testing.assert_close(layer(x), layer.project(torch.cat(outputs, -1)))
    torch.testing.assert_close(layer(x[:, :4]), layer(x)[:, :4])
    with pytest.raises(gs.UsageError, match="do not divide"):
        GINAttention(8, 3, 4)


def adapters_of(model, scale=0.0):
    found = torch.nn.ModuleList(gs.attention.SparseGIN(64, 8) for _ in model.model.layers)
    with torch.no_grad():
        for adapter in found:
            adapter.scale.fill_(scale)
    return found


IDS = torch.arange(30).reshape(2, 15)


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_scale_of_zero_is_the_base_model_and_all_is_put_back(tiny_llama):
    model = tiny_llama().eval()
    model.set_attn_implementation("eager")
    base = logits_of(model)
    model.set_attn_implementation("sdpa")
    model.lm_head.weight.requires_grad_(False)
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(vars(model.config))
    flags = [p.requires_grad for p in model.parameters()]
    plain = logits_of(model)
    with gs.attention_adapters(model, adapters_of(model)):
        assert torch.equal(logits_of(model), base)
    with gs.attention_adapters(model, adapters_of(model, 0.5)):
        assert not torch.allclose(logits_of(model), base, atol=1e-2)
    assert torch.equal(logits_of(model), plain) and vars(model.config) == config
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_adapter_stands_between_attention_and_feed_forward(tiny_llama):
    model = tiny_llama(layers=1).eval()
    model.set_attn_implementation("eager")
    (adapter,) = adapters = adapters_of(model, 0.7)
    with gs.attention_adapters(model, adapters):
        found = logits_of(model)
    block, inner = model.model.layers[0], model.model
    with torch.no_grad():
        x = inner.embed_tokens(IDS)
        place = inner.rotary_emb(x, torch.arange(15).unsqueeze(0))
        mask = torch.full((15, 15), torch.finfo(x.dtype).min).triu(1)[None, None]
        out, weights = block.self_attn(
            block.input_layernorm(x), position_embeddings=place, attention_mask=mask
        )
        x = adapter(x + out, weights)
        x = x + block.mlp(block.post_attention_layernorm(x))
        wanted = model.lm_head(inner.norm(x))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_adapters_alone_learn(tiny_llama):
    model = tiny_llama().eval()
    adapters = adapters_of(model)
    optimizer = torch.optim.AdamW(adapters.parameters(), 3e-2)
    before, losses = copy.deepcopy(model.state_dict()), []
    with gs.attention_adapters(model, adapters):
        for _ in range(12):
            loss = model(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_adapted_is_named(tiny_llama):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama().eval()
    config = vars(model.config)["_attn_implementation_internal"]
    with pytest.raises(gs.UsageError, match="1 adapters for 2"):
        gs.attention_adapters(model, adapters_of(model)[:1]).__enter__()
    with (
        pytest.raises(gs.UsageError, match="use_cache=False"),
        gs.attention_adapters(model, adapters_of(model)),
    ):
        cache = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    assert vars(model.config)["_attn_implementation_internal"] == config
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        )
    ).eval()  # fmt: skip
    with pytest.raises(gs.UsageError, match="not built like Llama's"):
        gs.attention_adapters(bert, adapters_of(model)[:1]).__enter__()
