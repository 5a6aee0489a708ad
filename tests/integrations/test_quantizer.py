"""transformers loads packed folders by itself, or fails with one line that names the remedy."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import gossamer as gs
from gossamer.core.errors import FormatError, UsageError
from gossamer.nn import BitmapLinear, QuantizedLinear

tf = pytest.importorskip("transformers")
IDS = torch.arange(24).reshape(2, 12)
TEXT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def llama(**more):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **more)).eval()


def gemma():
    torch.manual_seed(0)
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT, head_dim=16)).eval()


def gpt2():
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return tf.GPT2LMHeadModel(config).eval()


def mixtral():
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4)).eval()


def zeros_in(parameter):
    """So that it is stored by its zeros, though no kernel serves it."""
    generator = torch.Generator().manual_seed(3)
    parameter.data *= torch.rand(parameter.shape, generator=generator) < 0.3


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def packed(model):
    return [name for name, m in model.named_modules() if isinstance(m, BitmapLinear)]


MODELS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma,
          "gpt2": gpt2, "mixtral": mixtral}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", [False, True])
def test_from_pretrained_loads_what_save_wrote(name, shards, tmp_path, monkeypatch, capfd):
    model = MODELS[name]()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    zeros_in(model.get_input_embeddings().weight)
    if name == "mixtral":
        for layer in model.model.layers:
            zeros_in(layer.mlp.experts.gate_up_proj)
    expected = logits(model)
    if shards:
        monkeypatch.setattr(sys.modules["gossamer.io.save"], "LARGEST", 30_000)
    gs.save(fast := gs.compress(model, latency="rule"), tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), expected)
    assert packed(again) == packed(fast.model) and packed(again)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert not hasattr(again.config, "transformers_weights")
    assert "MISSING" not in capfd.readouterr().err
    torch.testing.assert_close(logits(copy.deepcopy(again)), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_and_another_dtype(bits, tmp_path):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    fast = gs.compress(model, bits=bits, group=64).model
    gs.save(fast, tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(fast))
    assert any(isinstance(m, QuantizedLinear) for m in again.modules())
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16


def test_the_dtype_that_is_asked_for(tmp_path):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {half.get_submodule(name).values.dtype for name in packed(half)} == {torch.bfloat16}
    loaded = gs.load(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(half), logits(loaded))


def test_a_base_model_and_another_head_find_their_layers(tmp_path):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    base = tf.AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = gs.load(tmp_path / "out").model(IDS)[0]
        torch.testing.assert_close(base(IDS)[0], expected)
    head = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert len(packed(head)) == len(packed(base)) > 0

    gs.save(base, tmp_path / "base")  # and back: a head over the folder of a base
    wider = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(wider.model(IDS)[0], expected)


def test_convolutions(tmp_path):
    config = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    model = tf.ResNetModel(config).eval()
    x = torch.randn(1, 3, 32, 32)
    gs.prune(model, gs.weights.Magnitude(), density=0.1)
    with torch.no_grad():
        expected = model(x)[0]
        gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
        again = tf.AutoModel.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(again(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_damage_is_told_by_from_pretrained_too(tmp_path):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    path = tmp_path / "out/gossamer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="digest"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_layers_that_would_be_slower_run_dense(tmp_path, monkeypatch):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    expected = logits(model)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    fill = sys.modules["gossamer.io.fill"]
    with monkeypatch.context() as patch:
        patch.setattr(fill, "why_dense", lambda *_: "no kernel wins: here")
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not packed(again)
        torch.testing.assert_close(logits(again), expected)
        again.save_pretrained(tmp_path / "again")
    there = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert packed(there)
    torch.testing.assert_close(logits(there), expected)


@pytest.mark.parametrize("how", ["compressed", "loaded", "from_pretrained"])
def test_save_pretrained_writes_what_can_be_read_back(how, tmp_path):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    expected = logits(model)
    fast = gs.compress(model, latency="rule").model
    gs.save(fast, tmp_path / "first")
    if how == "loaded":
        fast = gs.load(tmp_path / "first")
    elif how == "from_pretrained":
        fast = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    out = tmp_path / "out"
    llama().save_pretrained(out)  # weights of another model that lie there already
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("mine")
    fast.save_pretrained(out)
    assert (out / "README.md").read_text() == "mine"
    assert sorted(os.listdir(out)) == [
        "README.md", "config.json", "generation_config.json", "gossamer.json", "gossamer.safetensors",
        "notes.txt",
    ]  # fmt: skip
    torch.testing.assert_close(logits(gs.load(out)), expected)
    torch.testing.assert_close(logits(tf.AutoModelForCausalLM.from_pretrained(out)), expected)
    with pytest.raises(UsageError, match="push"):
        fast.save_pretrained(out, push_to_hub=True)


def test_models_that_are_not_packed_are_saved_as_ever(tmp_path):
    llama().save_pretrained(tmp_path / "out")
    assert "model.safetensors" in os.listdir(tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(llama()))


def test_sentence_transformer_and_back(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                                   *"abcdefgh"]))  # fmt: skip
    tokenizer = tf.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = tf.BertModel(config).eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out", tokenizer=tokenizer)
    encoder = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected = encoder.encode(["a b c"])
    assert any(isinstance(m, BitmapLinear) for m in encoder.modules())
    encoder.save_pretrained(str(tmp_path / "again"))
    again = st.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert abs(again.encode(["a b c"]) - expected).max() < 1e-6
    gs.export(tmp_path / "again", tmp_path / "dense")
    dense = st.SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    assert abs(dense.encode(["a b c"]) - expected).max() < 1e-6
    assert not any(isinstance(m, BitmapLinear) for m in dense.modules())


def test_the_layout_of_the_hubs_cache(tmp_path):
    """There every file is a link into `blobs`; nothing else that is a link is read."""
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    expected = logits(model)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    snapshot = tmp_path / "models--me--x/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--x/blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "out").iterdir())):
        file.rename(tmp_path / f"models--me--x/blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    torch.testing.assert_close(logits(gs.load(snapshot)), expected)
    again = tf.AutoModelForCausalLM.from_pretrained(snapshot)
    torch.testing.assert_close(logits(again), expected)
    shutil.copy(snapshot / "config.json", tmp_path / "outside.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(FormatError, match="not a regular file"):
        gs.load(snapshot)


def test_the_file_that_config_json_names_is_ours(tmp_path):
    model = llama()
    gs.save(gs.prune(model, gs.weights.Magnitude(), density=0.4), tmp_path / "out")
    path = tmp_path / "out/config.json"
    facts = json.loads(path.read_text())
    facts["quantization_config"]["weights"] = "../other.safetensors"
    path.write_text(json.dumps(facts))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


CODE = """
{before}
import transformers, torch
{after}
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print(float(model(torch.arange(12)[None]).logits.abs().sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_in_a_fresh_process(when, tmp_path):
    model = llama()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    parts = {"before": "", "after": "", when: "import gossamer"}
    code = CODE.format(folder=str(tmp_path / "out"), before=parts["before"], after=parts["after"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if when == "never":
        assert done.returncode and "import gossamer" in done.stderr.strip().splitlines()[-1]
    else:
        total = float(model(torch.arange(12)[None]).logits.abs().sum())
        assert float(done.stdout) == pytest.approx(total, rel=1e-4), done.stderr
