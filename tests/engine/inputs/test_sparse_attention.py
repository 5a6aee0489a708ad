"""gs.sparse_attention: models of transformers run by a method's pairs, and are left as they were."""

import copy

import pytest
import torch
from small_models import inputs, make

import gossamer as gs
from gossamer.engine.inputs.counting import full_layout

transformers = pytest.importorskip("transformers")


def output(model, **given):
    with torch.no_grad():
        found = model(**given)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


class Everything:
    """A method that keeps every pair, for either kind of attention."""

    card = gs.attention.BlockSparse.card

    def layout(self, call):
        return full_layout(call, 16)


SPARSE = "streamingllm:window=24,block=16"
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "neox")


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*CAUSAL, "bert", "vit"])
def test_all_pairs_are_dense_attention_in_every_family(family, kind):
    model = make(family)
    model.set_attn_implementation(kind)
    before = [copy.deepcopy(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    given = inputs(family)
    dense = output(model, **given)
    with gs.sparse_attention(model, Everything(), dense_below=0, measure=True) as run:
        found = output(model, **given)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
    after = [vars(m.config) for m in model.modules() if hasattr(m, "config")]
    assert before == after and torch.equal(output(model, **given), dense)
    result = run.result
    assert [layer.calls for layer in result.layers] == [1, 1] and result.calls == 2
    assert result.density == 1.0 and result.recall == pytest.approx(1) and result.error < 1e-5
    assert result.choosing_flops == 0 and result.flops == result.dense_flops


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "vit"])
def test_a_sparse_method_changes_the_output(family):
    model, given = make(family), inputs(family)
    method = SPARSE if family in CAUSAL else gs.attention.BlockSparse(blocks=2, block=8)
    dense = output(model, **given)
    with gs.sparse_attention(model, method, dense_below=0) as run:
        found = output(model, **given)
    assert not torch.allclose(found, dense, rtol=1e-3, atol=1e-4)
    assert run.result.density < 0.6 and run.result.recall is None


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_short_prompts_and_decoding_run_as_the_model_does_bit_for_bit(kind):
    model = make("llama")
    model.set_attn_implementation(kind)
    given = inputs("llama", 60, batch=2)
    padded = given | {"attention_mask": torch.ones(2, 60, dtype=torch.long)}
    padded["attention_mask"][0, :25] = 0
    for each in (given, padded):
        dense = output(model, **each)
        wanted = model.generate(**each, max_new_tokens=4, do_sample=False)
        with gs.sparse_attention(model, SPARSE, dense_below=100) as run:
            assert torch.equal(output(model, **each), dense)
            assert torch.equal(model.generate(**each, max_new_tokens=4, do_sample=False), wanted)
        result = run.result
        assert (result.calls, result.short_calls, result.decode_calls) == (0, 4, 6)
        assert result.density is None and result.dense_below == 100


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("chunks", [(90,), (40, 50), (89, 1), (50, 39, 1)])
def test_caches_chunks_and_padding(llama, cache, padding, chunks):
    """Prefill in parts, then one token, against the model's own attention on the whole."""
    ids = inputs("llama", 90, batch=2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    wanted = output(llama, input_ids=ids, attention_mask=mask)
    past = transformers.DynamicCache(config=llama.config)
    if cache == "static":
        past = transformers.StaticCache(config=llama.config, max_cache_len=128)
    found, done = [], 0
    with gs.sparse_attention(llama, Everything(), dense_below=0) as run, torch.no_grad():
        for size in chunks:
            end = done + size
            places = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, done:]
            found.append(
                llama(
                    input_ids=ids[:, done:end], attention_mask=mask[:, :end], position_ids=places,
                    past_key_values=past, use_cache=True,
                ).logits
            )  # fmt: skip
            done = end
    found = torch.cat(found, dim=1)
    real = mask.bool()
    whole = output(
        llama, input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )
    torch.testing.assert_close(found[real], whole[real], rtol=1e-4, atol=1e-5)
    assert wanted.shape == found.shape
    single = 2 * sum(size == 1 for size in chunks)
    assert run.result.decode_calls == single
    assert run.result.calls == 2 * (len(chunks) - single // 2) * (2 if padding else 1)


@pytest.mark.parametrize(
    "method", [SPARSE, "blocksparse:blocks=2", "anchorattention:theta=0.3,step=2,block=16"]
)
def test_a_padded_batch_is_each_prompt_alone(llama, method):
    ids, mask = inputs("llama", 90, batch=2)["input_ids"], torch.ones(2, 90, dtype=torch.long)
    mask[0, :37] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with gs.sparse_attention(llama, method, dense_below=0):
        together = output(llama, input_ids=ids, attention_mask=mask, position_ids=places)
        alone = output(llama, input_ids=ids[:1, 37:])
    torch.testing.assert_close(together[:1, 37:], alone, rtol=1e-4, atol=1e-5)


def test_a_short_text_in_a_long_batch_runs_dense(llama):
    ids, mask = inputs("llama", 90, batch=2)["input_ids"], torch.ones(2, 90, dtype=torch.long)
    mask[0, :60] = 0
    dense = output(llama, input_ids=ids, attention_mask=mask)
    with gs.sparse_attention(llama, SPARSE, dense_below=50) as run:
        found = output(llama, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found[0, 60:], dense[0, 60:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], dense[1], atol=1e-4)
    assert (run.result.calls, run.result.short_calls) == (2, 2)


def test_a_later_token_changes_no_earlier_logits(llama):
    ids = inputs("llama", 90)["input_ids"]
    other = ids.clone()
    other[:, 70:] = 5
    with gs.sparse_attention(llama, SPARSE, dense_below=0):
        first, second = output(llama, input_ids=ids), output(llama, input_ids=other)
    assert torch.equal(first[:, :70], second[:, :70])
    assert not torch.equal(first[:, 70:], second[:, 70:])


def test_recall_and_error_are_those_of_the_whole_attention_map(llama):
    model = make("llama", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    ids = inputs("llama", 90)["input_ids"]
    weights = model(ids, output_attentions=True).attentions[0]
    place = torch.arange(90)
    kept = (place > place.unsqueeze(1) - 24) | (place < 4)
    wanted = (weights * kept).sum(-1).mean()
    with gs.sparse_attention(model, SPARSE, dense_below=0, measure=True) as run:
        output(model, input_ids=ids)
    assert run.result.recall == pytest.approx(float(wanted.detach()), abs=1e-5)
    seen = kept & (place <= place.unsqueeze(1))
    assert run.result.density == pytest.approx(int(seen.sum()) / (90 * 91 / 2))
    value = model.model.layers[0].self_attn.v_proj(
        model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    )
    value = value.view(1, 90, 2, 16).transpose(1, 2).repeat_interleave(2, dim=1)
    sparse = weights * kept / (weights * kept).sum(-1, keepdim=True)
    error = (sparse @ value - weights @ value).norm() / (weights @ value).norm()
    assert run.result.error == pytest.approx(float(error.detach()), abs=1e-5)


def test_training_goes_through_and_reaches_the_same_gradients():
    dense, sparse = make("llama").train(), make("llama").train()
    ids = inputs("llama")["input_ids"]
    dense(ids, labels=ids).loss.backward()
    with gs.sparse_attention(sparse, Everything(), dense_below=0, measure=True):
        sparse(ids, labels=ids).loss.backward()
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)


def test_the_choice_is_part_of_the_figures(llama):
    ids = inputs("llama", 96)["input_ids"]
    with gs.sparse_attention(llama, "blocksparse:blocks=2", dense_below=0) as run:
        output(llama, input_ids=ids)
    result = run.result
    # 2 layers of 4 heads: 6 blocks times 6 blocks times 16 multiply-adds.
    assert result.choosing_flops == 2 * 4 * 6 * 6 * 16 * 2
    pairs = result.density * 96 * 97 / 2 * 4 * 2
    assert result.flops == pytest.approx(pairs * 4 * 16 + result.choosing_flops)
    assert result.dense_flops == 2 * 4 * (96 * 97 // 2) * 4 * 16
    assert 0 < result.choosing_bytes < result.bytes
    assert "2 of 2 layers sparse" in str(result) and "recall" not in str(result)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_layer_called_without_a_mask_goes_by_what_its_attention_does(kind):
    """sdpa is causal where the layer says so; eager attends to both sides."""
    model = make("llama")
    model.set_attn_implementation(kind)
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 60, 64)
    places = model.model.rotary_emb(hidden, torch.arange(60).unsqueeze(0))
    with torch.no_grad():
        dense = layer(hidden, places, attention_mask=None)[0]
        with gs.sparse_attention(model, Everything(), dense_below=0):
            found = layer(hidden, places, attention_mask=None)[0]
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


def test_autocast_goes_through(llama):
    ids = inputs("llama", 60)["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        dense = output(llama, input_ids=ids)
        with gs.sparse_attention(llama, Everything(), dense_below=0) as run:
            found = output(llama, input_ids=ids)
    assert run.result.calls == 2 and found.dtype == dense.dtype
    torch.testing.assert_close(found, dense, rtol=0.1, atol=0.05)


def test_checkpointed_training_chooses_the_same_again():
    plain, model = make("llama").train(), make("llama").train()
    model.gradient_checkpointing_enable()
    ids = inputs("llama", 80)["input_ids"]
    for each in (plain, model):
        with gs.sparse_attention(each, "blocksparse:blocks=2", dense_below=0):
            each(ids, labels=ids, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


REFUSED = {
    "gemma2": "caps its logits|sliding",
    "gemma3": "sliding_attention",
    "gptoss": "sinks",
    "t5": "biases of positions|AttentionInterface",
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_served_are_refused_untouched(family):
    model = make(family)
    before = [copy.deepcopy(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    with (
        pytest.raises(gs.UsageError, match=REFUSED[family]),
        gs.sparse_attention(model, SPARSE, dense_below=0),
    ):
        pass
    assert before == [vars(m.config) for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: make("mistral", sliding_window=64), "sliding window of 64"),
        (lambda: make("qwen3", use_sliding_window=True, max_window_layers=1), "sliding"),
        (lambda: make("llama", attention_dropout=0.1).train(), "drops attention"),
        (lambda: make("bert").train(), "drops attention"),
        (lambda: make("bert", is_decoder=True, add_cross_attention=True), "another model"),
        (lambda: make("llama", output_attentions=True, attn_implementation="eager"), "weights"),
        (lambda: torch.nn.Linear(3, 3), "gs.attend"),
    ],
)
def test_options_that_cannot_be_served_are_refused(change, match):
    model = change()
    with pytest.raises(gs.UsageError, match=match), gs.sparse_attention(model, SPARSE):
        pass


def test_calls_that_cannot_be_served_are_refused(llama):
    ids = inputs("llama", 90)["input_ids"]
    whole = torch.ones(1, 1, 90, 90, dtype=torch.bool).tril()
    packed = torch.cat([torch.arange(40), torch.arange(50)]).unsqueeze(0)
    for given, match in (
        ({"attention_mask": whole}, "a mask of its own"),
        ({"position_ids": packed, "use_cache": False}, "packed"),
        ({"output_attentions": True}, "output_attentions"),
    ):
        with (
            pytest.raises(gs.UsageError, match=match),
            gs.sparse_attention(llama, SPARSE, dense_below=0),
        ):
            output(llama, input_ids=ids, **given)
    assert llama.config._attn_implementation == "sdpa"


def registered():
    from transformers import AttentionInterface, AttentionMaskInterface

    return sorted(AttentionInterface()), sorted(AttentionMaskInterface())


def test_an_error_inside_leaves_nothing_behind(llama):
    before = registered()
    with pytest.raises(ZeroDivisionError), gs.sparse_attention(llama, SPARSE) as run:
        assert registered() != before and llama.config._attn_implementation != "sdpa"
        1 / 0  # noqa: B018
    assert registered() == before and llama.config._attn_implementation == "sdpa"
    assert run.result.calls == 0


def test_blocks_do_not_nest_and_must_reach_a_layer(llama):
    ids = inputs("llama", 20)["input_ids"]
    with gs.sparse_attention(llama, SPARSE):
        with pytest.raises(gs.UsageError, match="already"), gs.sparse_attention(llama, SPARSE):
            pass
        output(llama, input_ids=ids)
    with (
        pytest.raises(gs.UsageError, match="none of 2 attention layers"),
        gs.sparse_attention(llama, SPARSE),
    ):
        pass
    assert llama.config._attn_implementation == "sdpa"


def test_two_models_may_be_sparse_at_once(llama):
    other, ids = make("llama"), inputs("llama", 60)["input_ids"]
    with (
        gs.sparse_attention(llama, SPARSE, dense_below=0) as one,
        gs.sparse_attention(other, Everything(), dense_below=0) as two,
    ):
        output(llama, input_ids=ids)
        output(other, input_ids=ids)
    assert one.result.density < 1 == two.result.density


def test_a_model_that_shares_the_config_is_told(llama):
    other = type(llama)(llama.config).eval()
    with (
        pytest.raises(gs.UsageError, match="shares its config"),
        gs.sparse_attention(llama, SPARSE, dense_below=0),
    ):
        output(other, input_ids=inputs("llama", 60)["input_ids"])


class Nothing:
    """A method that forgets every query but the first block's."""

    card = gs.attention.BlockSparse.card

    def layout(self, call):
        mask = torch.zeros_like(call.possible_blocks(16, 16))
        mask[0, 0] = True
        return gs.attention.BlockSparse.layout.__globals__["from_blocks"](mask, call, 16)


def test_a_query_without_keys_is_an_error(llama):
    with (
        pytest.raises(gs.UsageError, match="without keys"),
        gs.sparse_attention(llama, Nothing(), dense_below=0),
    ):
        output(llama, input_ids=inputs("llama", 60)["input_ids"])


def test_options_of_the_block_are_checked(llama):
    for bad in (-1, 0.5, True):
        with pytest.raises(gs.UsageError, match="dense_below"):
            gs.sparse_attention(llama, SPARSE, dense_below=bad).__enter__()
    with pytest.raises(gs.UsageError, match="pass an instance"):
        gs.sparse_attention(llama, gs.attention.BlockSparse).__enter__()
    with pytest.raises(gs.UsageError, match="one of weights"):
        gs.sparse_attention(llama, "magnitude").__enter__()
