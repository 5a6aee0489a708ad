"""Save, load, export: bitwise round trips."""

import os
import sys

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.errors import UsageError
from gossamer.core.matrix import as_matrix
from gossamer.io import atomic
from gossamer.nn import BitmapLinear, QuantizedLinear

transformers = pytest.importorskip("transformers")


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def logits(model):
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "build", [llama, lambda: llama(tied=True), gpt2], ids=["llama", "tied", "gpt2"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_export(build, dtype, tmp_path):
    model = build()
    # not model.to(dtype): that would round the rotary frequencies too, which no file stores
    model = type(model)._from_config(model.config, dtype=dtype).eval()
    pruned = gs.prune(model, gs.weights.Magnitude(), density=0.4)
    masked = {n: p.detach().clone() for n, p in model.named_parameters()}
    dense = logits(model)
    fast = gs.compress(pruned)
    expected = logits(fast.model)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert sum(isinstance(m, BitmapLinear) for m in again.modules()) == len(pruned.layers)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    gs.export(tmp_path / "out", tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
    assert torch.equal(logits(plain), dense)
    assert all(torch.equal(p, masked[n]) for n, p in plain.named_parameters())
    assert torch.equal(logits(gs.load(tmp_path / "dense")), dense)


@pytest.mark.parametrize(
    "text", ["unstructured:row", "2:4", "1:8", "block:4x1", "channel:0", "channel:1"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pattern_round_trips_in_a_plain_module(text, dtype, tmp_path):
    pattern = gs.parse_pattern(text)
    density = None if isinstance(pattern, gs.NM) else 0.5

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, 8, bias=False)).to(dtype)

    pruned = gs.prune(build(), gs.weights.Magnitude(), pattern=pattern, density=density)
    fast = gs.compress(pruned).model
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=build())
    x = torch.randn(3, 72).to(dtype)
    assert torch.equal(again(x), fast(x))
    assert again[0].pattern == text and torch.equal(again[0].values, fast[0].values)
    with pytest.raises(UsageError, match="model="):
        gs.load(tmp_path / "out")


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nm_round_trip_and_export(build, dtype, as_nm, tmp_path):
    model = build()
    model = type(model)._from_config(model.config, dtype=dtype).eval()
    pruned = gs.prune(model, gs.weights.Magnitude(), pattern=gs.NM(1, 4))
    masked = {n: p.detach().clone() for n, p in model.named_parameters()}
    fast = as_nm(pruned, "1:4")
    expected = logits(fast)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    gs.export(tmp_path / "out", tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
    assert all(torch.equal(p, masked[n]) for n, p in plain.named_parameters())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_quantised_round_trip_and_export(build, bits, tmp_path):
    model = build()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    fast = gs.compress(model, bits=bits, group=64).model
    expected = logits(fast)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    half = gs.load(tmp_path / "out", dtype=torch.bfloat16)
    assert half.get_submodule(sorted(again_names(again))[0]).scales.dtype == torch.bfloat16
    gs.export(tmp_path / "out", tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for name in again_names(again):
        weight = as_matrix(plain.get_submodule(name))
        assert torch.equal(weight, again.get_submodule(name).to_matrix().to(weight.dtype))
    assert torch.allclose(logits(plain), expected, atol=0.02)  # the kernels round inputs as well


def again_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("dense", [True, False])
def test_every_quantised_form_round_trips(
    bits, symmetric, outliers, dense, quantised_parts, tmp_path
):
    fast, empty = quantised_parts(symmetric, outliers, dense, bits)
    gs.save(fast, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=empty)
    assert set(again.state_dict()) == set(fast.state_dict())
    assert all(torch.equal(again.state_dict()[k], v) for k, v in fast.state_dict().items())
    torch.testing.assert_close(again(torch.ones(2, 150)), fast(torch.ones(2, 150)))
    assert again[0].kept == fast[0].kept and again[0].sparse == fast[0].sparse


def test_bert_whose_buffers_live_below_the_config(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model), tmp_path / "out")
    again = gs.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids)[0], model(ids)[0])


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["gossamer.io.save"], "LARGEST", 40_000)
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    fast = gs.compress(model).model
    gs.save(fast, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("gossamer-*.safetensors"))) > 2
    assert torch.equal(logits(gs.load(tmp_path / "out")), logits(fast))


def test_occupied_folder_and_full_disk(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="overwrite"):
        gs.save(net, out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        gs.save(net, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep me" and os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    gs.save(net, out, overwrite=True)
    assert sorted(os.listdir(out)) == ["gossamer.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
