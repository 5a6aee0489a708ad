"""Caches whose older tokens are in tiles: against dense attention over pruned keys and values."""

import json

import pytest
import torch
from small_models import inputs, make

import gossamer as gs
from gossamer.core.errors import FormatError, UsageError

pytest.importorskip("transformers")

from gossamer.engine.inputs.caches.cache import keeper_of
from gossamer.engine.inputs.caches.rows import Prompt

A = gs.attention
METHOD = A.Mustafar(density=0.3, tail=5, every=64)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def pruned(method, key, value, length):
    """Keys and values as the method leaves them: whole steps before the tail lose entries."""
    count = max(0, length - method.tail) // method.every * method.every
    found = []
    for x, keys in ((key, True), (value, False)):
        x = x.clone()
        x[:, :, :count] *= method.kept_entries(x[:, :, :count], keys)
        found.append(x)
    return found


def dense(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@pytest.mark.parametrize("start", [0, 5, 68, 69, 200])
def test_each_token_reads_pruned_rows_and_a_dense_tail(start):
    generator = torch.Generator().manual_seed(start)
    draw = lambda heads, n: torch.randn(2, heads, n, 16, generator=generator)  # noqa: E731
    key, value = draw(2, start), draw(2, start)
    rows = keeper_of(METHOD, 0, 1).start(Prompt(draw(4, 0), key, value, 0.25))
    for step in range(140):
        new = 1 if step % 9 else 3
        added = draw(2, new), draw(2, new)
        rows.append(*added)
        key, value = torch.cat([key, added[0]], 2), torch.cat([value, added[1]], 2)
        assert rows.length == key.shape[2] and rows.rows == 4 * key.shape[2]
        query = draw(4, 1)
        output, read = rows.attend(query, 0.25)
        if new > 1:
            continue
        expected = dense(query, *pruned(METHOD, key, value, key.shape[2]))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert read.keys == rows.rows and read.bytes <= rows.nbytes
    many = draw(4, 30)
    output, _ = rows.past(many, 0.25)
    expected = dense(many, *pruned(METHOD, key, value, key.shape[2]))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_the_tiles_and_the_tail():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2048 + 40, 64).to(torch.bfloat16)
    rows = keeper_of(A.Mustafar(density=0.3), 0, 1).start(Prompt(x, x, x, 1.0))
    tiles = rows.nbytes - 2 * x[:, :, :40].nbytes
    assert 0.45 < tiles / (2 * x[:, :, :2048].nbytes) < 0.47


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "neox"])
def test_density_1_is_dense_and_less_is_not(family):
    model = make(family)
    ids = inputs(family, 90)["input_ids"]
    options = {"max_new_tokens": 50, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 50}
    logits = [
        torch.stack(model.generate(ids, **options, **more).logits)
        for more in (
            {},
            {"past_key_values": gs.attention_cache(model, "mustafar:density=1,every=64,tail=8")},
            {"past_key_values": gs.attention_cache(model, METHOD)},
        )
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[2][0], logits[0][0])  # a prompt is dense
    assert not torch.allclose(logits[2][1:], logits[0][1:], atol=1e-4)


def test_a_batch_of_unequal_prompts_is_each_alone(llama):
    ids = inputs("llama", 90, batch=3)["input_ids"]
    mask = torch.ones_like(ids)
    for text, padding in enumerate((0, 15, 33)):
        mask[text, :padding] = 0
    options = {"max_new_tokens": 60, "do_sample": False, "min_new_tokens": 60}
    cache = gs.attention_cache(llama, METHOD)
    together = llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for text, padding in enumerate((0, 15, 33)):
        own = ids[text : text + 1, padding:]
        alone = llama.generate(own, past_key_values=gs.attention_cache(llama, METHOD), **options)
        assert torch.equal(together[text, 90:], alone[0, 90 - padding :])


def test_beams_are_reordered_with_their_tiles(llama):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 150, 16, generator=generator)
    rows = keeper_of(METHOD, 0, 1).start(Prompt(x[:, :, :0], x, -x, 1.0))
    order = torch.tensor([2, 0, 0])
    taken = rows.taken(order)
    again = keeper_of(METHOD, 0, 1).start(Prompt(x[:, :, :0], x[order], -x[order], 1.0))
    query = torch.randn(3, 4, 1, 16, generator=generator)
    assert torch.equal(taken.attend(query, 1.0)[0], again.attend(query, 1.0)[0])
    ids = inputs("llama", 90)["input_ids"]
    options = {"max_new_tokens": 50, "do_sample": False, "num_beams": 3, "min_new_tokens": 50}
    cache = gs.attention_cache(llama, "mustafar:density=1,every=64,tail=8")
    assert torch.equal(llama.generate(ids, **options, past_key_values=cache),
                       llama.generate(ids, **options))  # fmt: skip


def test_only_the_dense_tail_can_be_taken_back(llama):
    ids = inputs("llama", 90)["input_ids"]
    cache = gs.attention_cache(llama, METHOD)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        before = llama(ids[:, :1], past_key_values=cache).logits
        kept = cache.layers[0].stored[0].length - 64
        with pytest.raises(UsageError, match="the older ones are compressed"):
            cache.crop(-kept - 1)
        cache.crop(-1)
        assert torch.equal(llama(ids[:, :1], past_key_values=cache).logits, before)


def test_a_saved_cache_goes_on_and_damage_is_found(llama, tmp_path):
    ids, path = inputs("llama", 150, batch=2)["input_ids"], tmp_path / "cache.safetensors"
    cache = gs.attention_cache(llama, METHOD)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        cache.save(path)
        restored = gs.attention_cache(llama, METHOD, saved=path)
        assert restored.layers[0].stored[0].tensors().keys() > {
            "keys.0.bitmaps",
            "values.0.entries",
        }
        for _ in range(3):
            both = [llama(ids[:, :1], past_key_values=c).logits for c in (cache, restored)]
            assert torch.equal(*both)
    keeper, tensors = keeper_of(METHOD, 0, 1), cache.layers[0].stored[0].tensors()
    length = cache.layers[0].stored[0].length
    assert keeper.restore(tensors, 2, length).length == length
    for change in (
        {"keys.0.offsets": tensors["keys.0.offsets"] + 1},
        {"keys.0.bitmaps": tensors["keys.0.bitmaps"].flip(0)},
        {"keys.0.entries": tensors["keys.0.entries"].double()},
        {"values.0.bitmaps": tensors["values.0.bitmaps"][:1]},
        {"key": tensors["key"][:1]},
        {"key": tensors["key"][0]},
        {"value": tensors["value"][..., :3]},
        {"more": tensors["key"]},
    ):
        with pytest.raises(FormatError):
            keeper.restore({**tensors, **change}, 2, length)
    with pytest.raises(FormatError):
        keeper.restore(tensors, 2, length + 64)


def test_options_that_cannot_be():
    for options, said in (
        ({"density": 0}, "density"),
        ({"value_density": 1.5}, "density"),
        ({"every": 100}, "a multiple of 64"),
        ({"every": 0}, "every"),
        ({"tail": -1}, "tail"),
    ):
        with pytest.raises(UsageError, match=said):
            A.Mustafar(**options)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_exactly_the_smallest_entries_leave(sparsity, width):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, width)
    x[..., 3] = x[..., 9] = 0.5  # ties go by index
    mask = A.Mustafar(density=1 - sparsity).kept_entries(x, True)
    dropped = int(sparsity * width)
    assert (mask.sum(-1) == width - dropped).all()
    bar = x.abs().sort(-1).values[..., dropped - 1 : dropped + 1]
    assert (mask | (x.abs() <= bar[..., 1:])).all() and (~mask | (x.abs() >= bar[..., :1])).all()
    both = A.Mustafar(density=0.5, value_density=0.25)
    assert both.kept_entries(x, False).sum() == x.numel() // 4
    assert json.dumps(repr(both))
