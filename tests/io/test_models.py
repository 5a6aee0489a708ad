"""Models as users bring them: computed buffers, wrappers, configs that do not validate."""

import json
import logging
import threading

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.errors import FormatError, UsageError
from gossamer.io.manifest import read_manifest
from gossamer.io.skeleton import outline, parameters_on_meta, skeleton

tf = pytest.importorskip("transformers")
IDS = torch.arange(3, 27).reshape(2, 12)
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
COMPUTED = {
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**TEXT)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT)),
    "xglm": lambda: tf.XGLMForCausalLM(tf.XGLMConfig(
        vocab_size=64, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4,
        max_position_embeddings=64)),
    "m2m100": lambda: tf.M2M100Model(tf.M2M100Config(**SEQ)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(tf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=8)),
    "bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "falcon_mamba": lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "mamba2, infinity": lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8,
        n_groups=1, chunk_size=8)),
    "swin": lambda: tf.SwinModel(tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
        window_size=4)),
}  # fmt: skip


def test_a_type_that_cannot_draw_its_own_numbers_is_built(tmp_path):
    config = tf.Pix2StructTextConfig(
        vocab_size=64, hidden_size=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    with torch.device("meta"):
        model = tf.Pix2StructTextModel(config)
    facts = {**json.loads(config.to_json_string()), "architectures": ["Pix2StructTextModel"]}
    built = skeleton(facts)
    assert built.state_dict().keys() == model.state_dict().keys()
    assert not any(buffer.is_meta for buffer in built.buffers())


def inputs(name):
    if name == "swin":
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator())}
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if name == "m2m100" else {})}


def first(model, name):
    with torch.no_grad():
        return model(**inputs(name))[0]


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_buffers_are_what_the_class_computes(name, tmp_path):
    torch.manual_seed(0)
    model = COMPUTED[name]().eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    x = inputs(name)
    with torch.no_grad():
        expected = model(**x)[0]
    gs.save(model, tmp_path / "out")
    again = gs.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(**x)[0], expected)
    for key, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(key), buffer), key
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert read_manifest(tmp_path / "out")["rebuild"] is None


def test_bfloat16_models_get_buffers_that_bfloat16_layers_take(tmp_path):
    config = COMPUTED["xglm"]().config
    model = tf.XGLMForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(model, tmp_path / "out")
    assert torch.equal(first(gs.load(tmp_path / "out"), "xglm"), first(model, "xglm"))


def test_only_parameters_lose_their_memory_and_ties_are_kept():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 4))
            self.b = self.a
            self.register_buffer("c", torch.arange(3), persistent=False)
            self.steps = [x.item() for x in torch.linspace(0, 1, 3)]

    register = nn.Module.register_parameter
    with parameters_on_meta():
        made = Tied()
        other = []
        thread = threading.Thread(target=lambda: other.append(Tied()))
        thread.start()
        thread.join()
    assert nn.Module.register_parameter is register
    assert made.a.is_meta and made.a is made.b and made.steps == [0, 0.5, 1]
    assert torch.equal(made.c, torch.arange(3))
    assert not other[0].a.is_meta  # what other threads build meanwhile is theirs
    with pytest.raises(RuntimeError), parameters_on_meta():
        raise RuntimeError
    assert nn.Module.register_parameter is register


def test_a_skeleton_takes_no_memory_for_weights():
    resource = pytest.importorskip("resource")
    config = tf.GPTBigCodeConfig(n_layer=6, n_embd=1024, n_head=16, architectures=["x"]).to_dict()
    config["architectures"] = ["GPTBigCodeForCausalLM"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built = skeleton(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000
    assert sum(p.numel() for p in built.parameters()) > 100e6
    assert {n: p.shape for n, p in built.state_dict().items()} == {
        n: p.shape for n, p in outline(config).state_dict().items()
    }


def test_a_model_that_its_config_does_not_describe_says_so_at_save(tmp_path, caplog):
    model = COMPUTED["gemma"]()
    model.extra = nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING, "gossamer"):
        gs.save(model, tmp_path / "out")
    assert "model=" in caplog.text and "extra" in caplog.text
    with pytest.raises(UsageError, match=r"extra.*model="):
        gs.load(tmp_path / "out")
    other = COMPUTED["gemma"]()
    other.extra = nn.Linear(4, 4)
    gs.load(tmp_path / "out", model=other)
    assert torch.equal(other.extra.weight, model.extra.weight)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


class Inside(nn.Module):
    """A wrapper in the middle of a model, one inside another."""

    def __init__(self):
        super().__init__()
        self.net = nn.DataParallel(torch.compile(mlp()))


WRAPPED = {
    "compile": lambda: torch.compile(mlp()),
    "parallel": lambda: nn.DataParallel(mlp()),
    "both": lambda: torch.compile(nn.DataParallel(mlp())),
    "inside": Inside,
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("packed", [True, False])
def test_names_of_wrappers_are_not_written(name, packed, tmp_path):
    net = WRAPPED[name]()
    gs.prune(net, gs.weights.Magnitude(), density=0.2)
    bare = mlp()
    gs.prune(bare, gs.weights.Magnitude(), density=0.2)
    gs.save(gs.compress(net, latency="rule") if packed else net, tmp_path / "out")
    empty = nn.Module()
    empty.net = mlp()
    empty = empty if name == "inside" else mlp()
    loaded = gs.load(tmp_path / "out", model=empty)
    x = torch.randn(3, 64)
    again = loaded.net if name == "inside" else loaded
    torch.testing.assert_close(again(x), bare(x))
    decisions = read_manifest(tmp_path / "out")["decisions"]
    assert not any("module" in key or "_orig" in key for key in decisions)


def test_a_wrapped_model_is_filled_inside(tmp_path):
    gs.save(mlp(), tmp_path / "out")
    empty = nn.DataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)))
    gs.load(tmp_path / "out", model=empty)
    assert torch.equal(empty.module[0].weight, mlp()[0].weight)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], r=2)
    return peft.get_peft_model(mlp(), config)


def on_meta():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))


class Loaded8Bit(nn.Linear):
    quantization_method = "bitsandbytes"


REFUSED = {
    "peft": (adapted, "merge_sparse"),
    "meta": (on_meta, r"1\.weight is on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"0\.weight has no shape"),
    "sparse": (lambda: sparse_parameter(), "layout torch.sparse_coo"),
    "quantised": (lambda: Loaded8Bit(4, 4), "bitsandbytes"),
    "pipeline": (lambda: Pipeline(), r"\.model"),
    "extra state": (lambda: nn.Sequential(Extra()), "only tensors"),
}


def sparse_parameter():
    net = nn.Module()
    net.weight = nn.Parameter(torch.eye(3).to_sparse())
    return net


class Pipeline:
    def __init__(self):
        self.model = mlp()


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def get_extra_state(self):
        return {"scale": 3}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_folder_holds_is_refused_before_anything_is_written(name, tmp_path):
    make, match = REFUSED[name]
    model = make()
    with pytest.raises(UsageError, match=match) as caught:
        gs.save(model, tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_generation_config_that_does_not_validate_is_written_as_it_is(tmp_path):
    model = COMPUTED["gemma"]()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.9
    with pytest.raises(ValueError, match="invalid"):
        model.generation_config.save_pretrained(tmp_path / "refused")
    gs.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.9
    assert gs.load(tmp_path / "out") is not None
    gs.export(tmp_path / "out", tmp_path / "dense")
    assert tf.GemmaForCausalLM.from_pretrained(tmp_path / "dense").generation_config.temperature


def test_a_config_that_does_not_validate_is_written_with_a_word(tmp_path, caplog):
    model = COMPUTED["gemma"]()
    model.config.temperature = 0.5  # transformers refuses to write it there
    gs.save(model, tmp_path / "out")
    assert "unchecked" in caplog.text
    assert torch.equal(first(gs.load(tmp_path / "out"), "gemma"), first(model.eval(), "gemma"))


def test_save_leaves_the_model_and_its_config_alone(tmp_path):
    model = COMPUTED["gemma"]()
    before = model.config.to_dict()
    gs.save(gs.prune(model, gs.weights.Magnitude(), density=0.3), tmp_path / "out")
    assert model.config.to_dict() == before


def test_a_transposed_view_of_a_square_weight_is_not_taken_for_its_tie(tmp_path):
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.detach().t())
    gs.save(net, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=nn.Sequential(*(nn.Linear(6, 6, bias=False),) * 1,
                                                          nn.Linear(6, 6, bias=False)))  # fmt: skip
    assert torch.equal(again[1].weight, net[1].weight)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(64, 64)
        self.b = nn.Sequential(self.a)


@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_under_two_names_is_stored_once_and_shared_again(packed, tmp_path):
    net = Twice()
    gs.prune(net, gs.weights.Magnitude(), density=0.2)
    dense = net.a.weight.detach().clone()
    gs.save(gs.compress(net, latency="rule") if packed else net, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=Twice())
    assert again.a is again.b[0] and torch.equal(torch.as_tensor(again.a.weight), dense)
    assert hasattr(again.a, "bitmap") == packed


def test_a_packed_instance_to_fill_is_refused_and_said_how(tmp_path):
    net = mlp()
    gs.prune(net, gs.weights.Magnitude(), density=0.2)
    gs.save(gs.compress(net, latency="rule"), tmp_path / "out")
    with pytest.raises(UsageError, match=r"layer 0 is packed.*unpack"):
        gs.load(tmp_path / "out", model=net)
    with pytest.raises(UsageError, match="unpack"):
        gs.export(tmp_path / "out", tmp_path / "dense", model=net)
    assert not (tmp_path / "dense").exists()


def test_what_is_loaded_can_be_unpacked(tmp_path):
    model = COMPUTED["bigcode"]().eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.2)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
    again = gs.unpack(gs.load(tmp_path / "out"))
    assert type(again.lm_head) is nn.Linear
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())


def test_a_config_that_asks_for_endless_buffers_gets_none(tmp_path):
    resource = pytest.importorskip("resource")
    model = COMPUTED["xglm"]()
    gs.save(model, tmp_path / "out")
    path = tmp_path / "out/config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "max_position_embeddings": 1 << 40}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match="buffers"):
        gs.load(tmp_path / "out", verify=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
