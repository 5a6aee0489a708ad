"""Ordinary folders out of packed ones and of models in memory, whatever library they are of."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gossamer as gs
from gossamer.core.errors import UsageError
from gossamer.nn import BitmapLinear

tf = pytest.importorskip("transformers")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def packed(net):
    return gs.compress(gs.prune(net, gs.weights.Magnitude(), density=0.2), latency="rule")


def test_a_plain_module_is_exported_from_its_folder_and_from_memory(tmp_path):
    fast = packed(mlp())
    masked = gs.prune(mlp(), gs.weights.Magnitude(), density=0.2).model.state_dict()
    gs.save(fast, tmp_path / "out")
    with pytest.raises(UsageError, match="model="):
        gs.export(tmp_path / "out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    gs.export(tmp_path / "out", tmp_path / "a", model=mlp())
    gs.export(fast, tmp_path / "b")
    gs.export(nn.DataParallel(fast.model), tmp_path / "c")
    for name in "abc":
        state = load_file(tmp_path / name / "model.safetensors")
        assert state.keys() == masked.keys()
        assert all(torch.equal(state[key], value) for key, value in masked.items())
        mlp().load_state_dict(state)
    assert isinstance(fast.model[0], BitmapLinear)  # what was exported stays as it was
    with pytest.raises(UsageError, match="model= is for a folder"):
        gs.export(fast, tmp_path / "d", model=mlp())


def test_a_transposed_layer_in_memory_is_written_as_it_was(tmp_path):
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = tf.GPT2LMHeadModel(config).eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.3)
    masked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gs.export(gs.compress(model, latency="rule"), tmp_path / "out")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in masked.items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_model_of_diffusers_goes_there_and_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def build():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
            block_out_channels=(32, 32), norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        ).eval()  # fmt: skip

    model = build()
    x, step = torch.randn(1, 3, 8, 8), torch.tensor(3)
    gs.prune(model, gs.weights.Magnitude(), density=0.3)
    with torch.no_grad():
        expected = model(x, step).sample
        gs.save(gs.compress(model, latency="rule"), tmp_path / "out")
        again = gs.load(tmp_path / "out")
        torch.testing.assert_close(again(x, step).sample, expected, rtol=1e-4, atol=1e-4)
        gs.export(tmp_path / "out", tmp_path / "dense")
        plain = diffusers.UNet2DModel.from_pretrained(tmp_path / "dense")
        torch.testing.assert_close(plain(x, step).sample, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        diffusers.UNet2DModel.from_pretrained(tmp_path / "out")


def test_what_belongs_to_the_model_goes_along_and_links_do_not(tmp_path):
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = tf.BertModel(config)
    gs.save(gs.prune(model, gs.weights.Magnitude(), density=0.3), tmp_path / "out")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "out/modules.json").write_text("[]")
    (tmp_path / "out/1_Pooling").mkdir()
    (tmp_path / "out/1_Pooling/config.json").write_text("{}")
    (tmp_path / "out/1_Pooling/link").symlink_to(secret)
    (tmp_path / "out/tokenizer.json").symlink_to(secret)
    (tmp_path / "out/2_Link").symlink_to(tmp_path)
    (tmp_path / "out/notes.txt").write_text("mine")
    gs.export(tmp_path / "out", tmp_path / "dense")
    found = {p.relative_to(tmp_path / "dense").as_posix() for p in (tmp_path / "dense").rglob("*")}
    assert found == {
        "config.json", "model.safetensors", "modules.json", "1_Pooling", "1_Pooling/config.json",
    }  # fmt: skip
