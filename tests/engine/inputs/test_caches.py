"""gs.attention_cache in models of transformers: their generate, ours, files, and bad input."""

import copy
import json

import pytest
import torch
from small_models import inputs, make

import gossamer as gs

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "qwen3", "mistral", "gemma", "neox")
SPARSE = {
    "snapkv": "snapkv:tokens=20,window=8,last=16",
    "adasnapkv": "adasnapkv:tokens=20,window=8,last=16",
    "streamingllm": "streamingllm:window=16",
    "quest": "quest:tokens=20,page=4",
}
GENEROUS = (
    "snapkv:tokens=999",
    "adasnapkv:tokens=999",
    "streamingllm:window=999",
    "quest:tokens=999",
)
A = gs.attention


def calibrated(model, **options):
    data = [torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))]
    return gs.calibrate_attention(model, A.DoubleSparsity(dense=0, **options), data)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(scope="module")
def methods(llama):
    return SPARSE | {"doublesparsity": calibrated(llama, tokens=20)}


def generated(model, ids, cache, new=8, **options):
    """Tokens and logits (new, batch, vocabulary)."""
    found = model.generate(
        ids, max_new_tokens=new, do_sample=False, past_key_values=cache, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def call(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_above_the_length_is_dense_in_every_family(family, kind):
    model = make(family)
    model.set_attn_implementation(kind)
    before = [copy.deepcopy(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    ids = inputs(family, 40)["input_ids"]
    tokens, logits = generated(model, ids, None, 5)
    for method in (*GENEROUS, calibrated(model, tokens=999)):
        cache = gs.attention_cache(model, method)
        found, its = generated(model, ids, cache, 5)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(its, logits, rtol=1e-5, atol=1e-5)
        assert cache.result.density == 1.0 and cache.result.tokens == 4
    assert before == [vars(m.config) for m in model.modules() if hasattr(m, "config")]
    names = transformers.AttentionInterface._global_mapping
    assert not any(name.startswith("gossamer") for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_budget_is_met_and_changes_the_output(family):
    model = make(family)
    ids = inputs(family, 80)["input_ids"]
    _, logits = generated(model, ids, None)
    for method in (*SPARSE.values(), calibrated(model, tokens=20)):
        cache = gs.attention_cache(model, method)
        _, its = generated(model, ids, cache)
        assert torch.equal(its[0], logits[0])  # the prompt is dense
        assert not torch.allclose(its[1:], logits[1:], atol=1e-4)
        result = cache.result
        assert result.seen == 87 and result.tokens == 7 and len(result.layers) == 2
        tail = 4 if "snapkv" in str(method) else 0  # tokens behind the prompt are kept
        assert 10 / 84 < result.density <= (20 + tail) / 84
        assert result.bytes_per_token < 0.65 * result.dense_bytes_per_token
        assert json.dumps(str(result))


@pytest.mark.parametrize("name", [*SPARSE, "doublesparsity"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unequal_prompts_is_each_alone(llama, methods, name, side):
    ids = inputs("llama", 60, batch=3)["input_ids"]
    mask = torch.ones_like(ids)
    for text, padding in enumerate((0, 15, 33)):
        mask[text, slice(0, padding) if side == "left" else slice(60 - padding, 60)] = 0
    cache = gs.attention_cache(llama, methods[name])
    if side == "left":
        _, together = generated(llama, ids, cache, attention_mask=mask)
        together = together.transpose(0, 1)
    else:  # generate pads on the left only
        steps = inputs("llama", 64, batch=3)["input_ids"][:, 60:]
        found = []
        places = mask.cumsum(-1) - 1
        call(llama, ids, cache, attention_mask=mask, position_ids=places.clamp(min=0))
        for i in range(4):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            place = (mask.cumsum(-1) - 1)[:, -1:]
            given = {"attention_mask": mask, "position_ids": place}
            found.append(call(llama, steps[:, i : i + 1], cache, **given)[:, 0])
        together = torch.stack(found, 1)
    for text in range(3):
        alone = gs.attention_cache(llama, methods[name])
        own = ids[text : text + 1, mask[text, :60].bool()]
        if side == "left":
            _, its = generated(llama, own, alone)
            its = its[:, 0]
        else:
            call(llama, own, alone)
            its = torch.cat(
                [call(llama, steps[text : text + 1, i : i + 1], alone)[0] for i in range(4)]
            )
        torch.testing.assert_close(together[text], its, rtol=1e-4, atol=1e-5)


def rotated(model, keys, places):
    """Keys as the model rotates them to places in the text."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cosines, sines = model.model.rotary_emb(keys, places)
    return apply_rotary_pos_emb(keys, keys, cosines, sines)[1]


@pytest.mark.parametrize("name", ["snapkv", "adasnapkv", "streamingllm"])
def test_a_second_turn_is_that_of_the_kept_rows_at_their_places(llama, name):
    """Against attention recomputed from the kept tokens' hidden states, at their positions."""
    model = make("llama", num_hidden_layers=1)
    ids = inputs("llama", 70)["input_ids"]
    cache = gs.attention_cache(model, SPARSE[name])
    call(model, ids[:, :50], cache)
    cache.end_prompt()
    kept = cache.layers[0].stored[0].positions[0]
    found = call(model, ids[:, 50:62], cache)  # positions come from the cache
    attention, states = model.model.layers[0].self_attn, None
    with torch.no_grad():
        states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[:, :62]))
        shape = (1, 62, -1, 16)
        query = attention.q_proj(states).view(shape).transpose(1, 2)
        key = attention.k_proj(states).view(shape).transpose(1, 2)
        value = attention.v_proj(states).view(shape).transpose(1, 2)
        places = torch.arange(62).unsqueeze(0)
        query, key = rotated(model, query, places), rotated(model, key, places)
        mask = torch.ones(4, 62, 62, dtype=torch.bool).tril()
        for head in range(4):
            mask[head, 50:, :50] = False
            mask[head, 50:, kept[head // 2]] = True
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        )
        hidden = model.model.embed_tokens(ids[:, :62])
        hidden = hidden + attention.o_proj(output.transpose(1, 2).reshape(1, 62, -1))
        block = model.model.layers[0]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        wanted = model.lm_head(model.model.norm(hidden))[:, 50:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 62 and cache.layers[0].rows == 2 * (20 + 12)
    call(model, ids[:, 62:63], cache)  # the second prompt is judged, together with what was kept
    assert cache.layers[0].rows == 2 * (20 + (name != "streamingllm"))


@pytest.mark.parametrize("name", [*SPARSE, "doublesparsity"])
def test_a_second_generate_goes_on_from_the_first(llama, methods, name):
    ids = inputs("llama", 50)["input_ids"]
    cache, one = (gs.attention_cache(llama, methods[name]) for _ in range(2))
    first, _ = generated(llama, ids, cache, 4)
    more = torch.cat([first, inputs("llama", 12)["input_ids"]], 1)
    second, logits = generated(llama, more, cache, 4)
    call(llama, ids, one)
    for token in first[0, 50:-1]:
        call(llama, token.reshape(1, 1), one)
    its = [call(llama, more[:, 53:], one)[:, -1]]
    its += [call(llama, token.reshape(1, 1), one)[:, -1] for token in second[0, -4:-1]]
    torch.testing.assert_close(logits, torch.stack(its), rtol=1e-5, atol=1e-5)
    ours = gs.attention_cache(llama, methods[name])
    assert torch.equal(gs.generate(llama, ids, 4, eos=(), cache=ours), first)
    found = gs.generate(llama, more[:, 53:], 4, eos=(), cache=ours)
    assert torch.equal(found[0, -4:], second[0, -4:])


@pytest.mark.parametrize("name", [*SPARSE, "doublesparsity"])
def test_a_prompt_in_chunks_is_the_whole_one(llama, methods, name):
    ids = inputs("llama", 60)["input_ids"]
    wanted = generated(llama, ids, gs.attention_cache(llama, methods[name]))
    found = generated(llama, ids, gs.attention_cache(llama, methods[name]), prefill_chunk_size=25)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*SPARSE, "doublesparsity"])
def test_beams_and_assistance(llama, methods, name):
    ids = inputs("llama", 30, batch=2)["input_ids"]
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    generous = {"doublesparsity": calibrated(llama, tokens=999)}.get(
        name, next((x for x in GENEROUS if x.startswith(name)), None)
    )
    wanted = llama.generate(ids, **options)
    cache = gs.attention_cache(llama, generous)
    assert torch.equal(llama.generate(ids, past_key_values=cache, **options), wanted)
    beams = gs.attention_cache(llama, methods[name])
    assert llama.generate(ids, past_key_values=beams, **options).shape == wanted.shape
    assert beams.layers[0].texts == 6
    assert beams.is_croppable == (name in ("quest", "doublesparsity"))


def test_assisted_generation_drafts_and_takes_back(llama):
    ids, draft = inputs("llama", 40)["input_ids"], make("llama", num_hidden_layers=1)
    options = {"max_new_tokens": 10, "do_sample": False}
    wanted = llama.generate(ids, **options)
    cache = gs.attention_cache(llama, "quest:tokens=999")
    found = llama.generate(ids, assistant_model=draft, past_key_values=cache, **options)
    assert torch.equal(found, wanted) and cache.get_seq_length() == 49
    with pytest.raises(gs.UsageError, match="cannot be taken back"):
        cache = gs.attention_cache(llama, "snapkv")
        llama.generate(ids, assistant_model=draft, past_key_values=cache, **options)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["quest", "doublesparsity"])
def test_tokens_are_taken_back_as_if_they_never_came(llama, methods, name):
    ids = inputs("llama", 80)["input_ids"]
    cache, plain = (gs.attention_cache(llama, methods[name]) for _ in range(2))
    for each in (cache, plain):
        call(llama, ids[:, :50], each)
        call(llama, ids[:, 50:51], each)
    for i in range(60, 69):
        call(llama, ids[:, i : i + 1], cache)
    cache.crop(-9)
    cache.crop(0)
    for i in range(51, 60):
        one, other = (call(llama, ids[:, i : i + 1], each) for each in (cache, plain))
        assert torch.equal(one, other)
    cache.crop(-60)  # all of it
    assert cache.get_seq_length() == 0
    with pytest.raises(gs.UsageError, match="from a cache of 0"):
        cache.crop(-1)
    with pytest.raises(gs.UsageError, match="negative"):
        cache.crop(3)


def test_what_was_given_up_cannot_be_taken_back(llama):
    ids = inputs("llama", 60)["input_ids"]
    cache = gs.attention_cache(llama, SPARSE["snapkv"])
    call(llama, ids[:, :50], cache)
    with pytest.raises(gs.UsageError, match="forgotten earlier queries"):
        cache.crop(-1)
    logits = [call(llama, ids[:, i : i + 1], cache) for i in range(50, 56)]
    cache.crop(-6)
    assert torch.equal(call(llama, ids[:, 50:51], cache), logits[0])
    before = cache.get_seq_length()
    with pytest.raises(gs.UsageError, match="given up keys 1 tokens ago"):
        cache.crop(-2)
    assert cache.get_seq_length() == before
    rolling = gs.attention_cache(llama, SPARSE["streamingllm"])
    call(llama, ids[:, :50], rolling)
    call(llama, ids[:, 50:51], rolling)
    with pytest.raises(gs.UsageError, match="cannot be taken back"):
        rolling.crop(-1)


@pytest.mark.parametrize("name", ["snapkv", "adasnapkv", "streamingllm"])
def test_memory_falls_and_no_view_holds_the_old_buffer(llama, name):
    ids = inputs("llama", 400)["input_ids"]
    cache = gs.attention_cache(llama, SPARSE[name])
    call(llama, ids, cache)
    assert cache.nbytes >= 400 * 2 * 2 * 16 * 2 * 4
    call(llama, ids[:, :1], cache)
    rows = cache.layers[0].stored[0]
    held = [x for x in vars(rows).values() if isinstance(x, torch.Tensor)]
    assert sum(x.untyped_storage().nbytes() for x in held) == rows.nbytes
    room = 64 * 2 * (2 * 16 * 4 + 8)
    assert rows.nbytes < room + 2 * 25 * 2 * 16 * 4 * 1.5
    result = cache.result
    assert result.resident_bytes == cache.nbytes < 0.3 * result.dense_bytes
    assert result.layers[0].rows == 20 + (name != "streamingllm")


def test_rows_grow_by_more_than_the_room_to_spare(llama):
    ids = inputs("llama", 400)["input_ids"]
    for name in ("adasnapkv", "quest"):
        cache = gs.attention_cache(llama, SPARSE[name])
        plain = gs.attention_cache(llama, SPARSE[name])
        for each in (cache, plain):
            call(llama, ids[:, :40], each)
            call(llama, ids[:, 40:41], each)
        call(llama, ids[:, 41:161], cache)
        for i in range(41, 161):
            logits = call(llama, ids[:, i : i + 1], plain)
        if name == "adasnapkv":  # which attends all that it holds
            found = call(llama, ids[:, 161:162], copy.deepcopy(plain))
            assert torch.equal(call(llama, ids[:, 161:162], plain), found)
            assert plain.layers[0].rows == 2 * (20 + 122) and logits.isfinite().all()
        assert cache.get_seq_length() == 161


@pytest.mark.parametrize("name", [*SPARSE, "doublesparsity"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_saved_cache_goes_on_as_the_one_that_was_not(llama, methods, name, padded, tmp_path):
    ids = inputs("llama", 60, batch=2)["input_ids"]
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, : 9 * padded] = 0
    cache = gs.attention_cache(llama, methods[name])
    call(llama, ids[:, :50], cache, attention_mask=mask[:, :50])
    call(llama, ids[:, 50:51], cache, attention_mask=mask[:, :51])
    cache.save(tmp_path / "cache.safetensors")
    again = gs.attention_cache(llama, methods[name], saved=tmp_path / "cache.safetensors")
    assert again.get_seq_length() == 51 and again.result.dense_bytes == cache.result.dense_bytes
    for i in range(51, 60):
        given = {"attention_mask": mask[:, : i + 1]}
        one, other = (call(llama, ids[:, i : i + 1], each, **given) for each in (cache, again))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(gs.UsageError, match="another model"):
        gs.attention_cache(
            make("llama", rope_theta=5000.0), methods[name], saved=tmp_path / "cache.safetensors"
        )
    with pytest.raises(gs.UsageError, match="other options"):
        other = "quest:tokens=24" if name != "quest" else "quest:tokens=28"
        gs.attention_cache(llama, other, saved=tmp_path / "cache.safetensors")
    with pytest.raises(gs.UsageError, match="empty cache"):
        gs.attention_cache(llama, methods[name]).save(tmp_path / "none")


def rewritten(path, change):
    """A saved cache with its tensors and facts changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["gossamer"])
    change(tensors, facts)
    save_file(tensors, path, {"gossamer": json.dumps(facts)})


def put(name, value):
    def change(tensors, facts):
        if name in facts:
            facts[name] = value
        else:
            tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("0.0.key", lambda x: x[:-1].clone()),
        put("0.0.value", lambda x: x.to(torch.int32)),
        put("0.0.counts", lambda x: x + 1),
        put("0.0.counts", lambda x: -x),
        put("0.0.counts", lambda x: x.flatten()),
        put("1.0.positions", lambda x: x.flip(0).contiguous()),
        put("1.0.positions", lambda x: x + 10**6),
        put("1.0.positions", lambda x: x - 100),
        put("seen", 3),
        put("texts", 7),
        put("texts", 2**40),
        put("lengths", []),
        put("lengths", [True]),
        put("version", 9),
        put("format", "other"),
        lambda tensors, facts: tensors.pop("1.0.key"),
        lambda tensors, facts: tensors.update(extra=torch.ones(1)),
        lambda tensors, facts: facts.update(extra=1),
    ],
)
def test_a_hostile_file_gets_one_clear_error(llama, tmp_path, change):
    path = tmp_path / "cache.safetensors"
    cache = gs.attention_cache(llama, SPARSE["adasnapkv"])
    call(llama, inputs("llama", 50)["input_ids"], cache)
    cache.save(path)
    rewritten(path, change)
    with pytest.raises(gs.FormatError):
        gs.attention_cache(llama, SPARSE["adasnapkv"], saved=path)


@pytest.mark.parametrize("size", [0, 7, 100, 2000])
def test_a_truncated_file_gets_one_clear_error(llama, tmp_path, size):
    path = tmp_path / "cache.safetensors"
    cache = gs.attention_cache(llama, SPARSE["quest"])
    call(llama, inputs("llama", 50)["input_ids"], cache)
    cache.save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(gs.FormatError):
        gs.attention_cache(llama, SPARSE["quest"], saved=path)
    with pytest.raises(gs.FormatError, match="no file"):
        gs.attention_cache(llama, SPARSE["quest"], saved=tmp_path / "absent")


@pytest.mark.parametrize("name", [*SPARSE, "doublesparsity"])
def test_copies_and_resets_are_independent(llama, methods, name):
    ids = inputs("llama", 60)["input_ids"]
    cache = gs.attention_cache(llama, methods[name])
    call(llama, ids[:, :50], cache)
    call(llama, ids[:, 50:51], cache)
    twin = copy.deepcopy(cache)
    wanted = call(llama, ids[:, 51:52], cache)
    for i in range(52, 60):
        call(llama, ids[:, i : i + 1], cache)
    assert torch.equal(call(llama, ids[:, 51:52], twin), wanted)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    with pytest.raises(gs.UsageError, match="none of 2 layers"):
        _ = cache.result
    call(llama, ids[:, :50], cache)
    call(llama, ids[:, 50:51], cache)
    assert torch.equal(call(llama, ids[:, 51:52], cache), wanted)


@pytest.mark.parametrize("name", ["snapkv", "quest"])
def test_a_sparse_prompt_and_a_sparse_cache_together(llama, name):
    ids = inputs("llama", 90, batch=2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = gs.attention_cache(llama, SPARSE[name])
    with gs.sparse_attention(llama, "streamingllm:window=24,block=16", dense_below=0) as run:
        _, logits = generated(llama, ids, cache, attention_mask=mask)
    assert run.result.calls == 4 and cache.result.density < 0.3
    _, prompts = generated(llama, ids, None, 1, attention_mask=mask)
    assert not torch.allclose(logits[0], prompts[0], atol=1e-4)
    with gs.sparse_attention(llama, "streamingllm:window=24,block=16", dense_below=0):
        _, same = generated(llama, ids, None, 1, attention_mask=mask)
    assert torch.equal(logits[0], same[0])


def test_a_prompt_of_one_token_and_an_empty_cache_that_is_true(llama):
    ids = inputs("llama", 6)["input_ids"]
    wanted = torch.cat([call(llama, ids[:, : i + 1], None)[:, -1:] for i in range(6)], 1)
    for method in GENEROUS:
        cache = gs.attention_cache(llama, method)
        assert cache and len(cache) == 2
        found = torch.cat([call(llama, ids[:, i : i + 1], cache) for i in range(6)], 1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_methods_start_from_one_prefill(llama, methods):
    ids = inputs("llama", 60, batch=2)["input_ids"]
    base = gs.attention_cache(llama, "snapkv")
    call(llama, ids[:, :50], base)
    for name, method in methods.items():
        own, plain = (gs.attention_cache(llama, method) for _ in range(2))
        own.start_from(base)
        call(llama, ids[:, :50], plain)
        for i in range(50, 53):
            one, other = (call(llama, ids[:, i : i + 1], each) for each in (own, plain))
            assert torch.equal(one, other), name
    small = gs.attention_cache(llama, SPARSE["snapkv"])
    call(llama, ids[:, :50], small)
    for bad in (small, own):
        with pytest.raises(gs.UsageError, match="whose prompt is not over"):
            gs.attention_cache(llama, "snapkv").start_from(bad)
    with pytest.raises(gs.UsageError, match="another model"):
        gs.attention_cache(make("qwen3"), "snapkv").start_from(base)


def test_bfloat16(llama):
    model = copy.deepcopy(llama).bfloat16()
    ids = inputs("llama", 60)["input_ids"]
    _, wanted = generated(model, ids, None, 4)
    for method in GENEROUS:
        _, found = generated(model, ids, gs.attention_cache(model, method), 4)
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_a_cache_of_another_model_is_refused_and_nothing_is_left(llama):
    other = make("llama", rope_theta=500.0)
    ids = inputs("llama", 40)["input_ids"]
    cache = gs.attention_cache(llama, SPARSE["quest"])
    with pytest.raises(gs.UsageError, match="another model"):
        call(other, ids, cache)
    one = make("llama", num_hidden_layers=1)
    with pytest.raises(gs.UsageError, match="another model"):
        call(llama, ids, gs.attention_cache(one, SPARSE["quest"]))
    for model in (llama, other):
        assert model.config._attn_implementation == "sdpa"
        assert call(model, ids, None).isfinite().all()
    cache.reset()
    assert call(llama, ids, cache).isfinite().all()
    shared = make("llama")
    for module in shared.modules():
        if hasattr(module, "config"):
            module.config = llama.config
    with pytest.raises(gs.UsageError, match="another model"):
        call(shared, ids, gs.attention_cache(llama, SPARSE["quest"]))


def test_an_interrupted_forward_is_found_out(llama):
    ids = inputs("llama", 40)["input_ids"]
    cache = gs.attention_cache(llama, SPARSE["quest"])
    call(llama, ids, cache)
    hook = llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(llama, ids[:, :1], cache)
    hook.remove()
    with pytest.raises(gs.UsageError, match="reset the cache"):
        call(llama, ids[:, :1], cache)
    cache.reset()
    call(llama, ids, cache)
    cache.binding.open(0, lambda: 1 / 0)  # as if it stopped between update and attention
    with pytest.raises(gs.UsageError, match="reset the cache"):
        call(llama, ids[:, :1], cache)
    assert llama.config._attn_implementation == "sdpa"
    assert call(llama, ids, None).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "gemma2", "gptoss", "t5"])
def test_models_that_are_not_served_are_refused(family):
    with pytest.raises(gs.UsageError):
        gs.attention_cache(make(family), SPARSE["quest"])


def test_bad_input(llama):
    ids = inputs("llama", 40, batch=2)["input_ids"]
    for bad, said in (
        (lambda: gs.attention_cache(llama, "blocksparse"), "keeps no cache"),
        (lambda: gs.attention_cache(llama, "wanda"), "one of weights"),
        (lambda: gs.attention_cache(llama, A.Quest), "pass an instance"),
        (lambda: gs.attention_cache(llama, A.DoubleSparsity()), "leaves none of 2 layers"),
        (lambda: gs.attention_cache(llama, "doublesparsity:dense=1"), "calibrate_attention"),
        (lambda: gs.attention_cache(llama, "quest:density=0.3,dense=1"), "fewer dense layers"),
        (lambda: gs.attention_cache(torch.nn.Linear(2, 2), "quest"), "no attention"),
        (lambda: gs.generate(llama, ids, 2, cache=3), "Cache of transformers"),
        (lambda: gs.sparse_attention(llama, A.Quest()).__enter__(), "chooses no pairs"),
    ):
        with pytest.raises(gs.UsageError, match=said):
            bad()

    class Forgetful(torch.nn.Module):
        config = llama.config

        def forward(self, input_ids, past_key_values, use_cache):
            return llama(input_ids, use_cache=True)

    with pytest.raises(gs.UsageError, match="did not use the cache"):
        gs.generate(Forgetful(), ids, 2, cache=gs.attention_cache(llama, SPARSE["quest"]))
    wide = calibrated(make("llama", num_key_value_heads=4), tokens=20)
    with pytest.raises(gs.UsageError, match="another model"):
        gs.attention_cache(llama, wide)
    cache = gs.attention_cache(llama, SPARSE["quest"])
    call(llama, ids, cache)
    with pytest.raises(gs.UsageError, match="2 texts was given 1"):
        call(llama, ids[:1], cache)
    cache.reset()
    with pytest.raises(gs.UsageError, match="no gradients"):
        llama(ids, past_key_values=cache)
    with pytest.raises(gs.UsageError, match="exceed the model's 512"):
        cache.reset()
        gs.generate(llama, inputs("llama", 300)["input_ids"], 2, cache=cache)
        gs.generate(llama, inputs("llama", 300)["input_ids"], 2, cache=cache)
