"""Where families keep their blocks, and which layers are pruned by default."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import UsageError
from gossamer.models import find_blocks, prunable_layers

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}


def hf(family, **changes):
    t = transformers
    build = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**LLAMA, **changes})),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64)
        ),
        "bert": lambda: t.BertModel(t.BertConfig(**SMALL, intermediate_size=64)),
        "bert-head": lambda: t.BertForSequenceClassification(
            t.BertConfig(**SMALL, intermediate_size=64)
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
    }
    return build[family]()


@pytest.mark.parametrize(
    "family, blocks, per_block",
    [
        ("llama", ["model.layers.0", "model.layers.1"], 7),
        ("mistral", ["model.layers.0", "model.layers.1"], 7),
        ("qwen2", ["model.layers.0", "model.layers.1"], 7),
        ("gpt2", ["transformer.h.0", "transformer.h.1"], 4),
        ("opt", ["model.decoder.layers.0", "model.decoder.layers.1"], 6),
        ("bert", ["encoder.layer.0", "encoder.layer.1"], 6),
        ("bert-head", ["bert.encoder.layer.0", "bert.encoder.layer.1"], 6),
        ("vit", ["vit.layers.0", "vit.layers.1"], 6),
    ],
)
def test_blocks_and_default_layers(family, blocks, per_block):
    model = hf(family)
    assert [prefix for prefix, _ in find_blocks(model)] == blocks
    layers = prunable_layers(model)
    if family == "opt":  # its embeddings are narrower than its blocks
        assert layers.pop("model.decoder.project_in")[1] is None
        assert layers.pop("model.decoder.project_out")[1] is None
    assert len(layers) == 2 * per_block
    for name, (module, block) in layers.items():
        assert name.startswith(blocks[block] + ".")
        assert model.get_submodule(name) is module


def test_single_block_of_a_known_family():
    assert [prefix for prefix, _ in find_blocks(hf("llama", num_hidden_layers=1))] == [
        "model.layers.0"
    ]


def test_encoder_decoder_has_both_lists():
    prefixes = [prefix for prefix, _ in find_blocks(hf("t5"))]
    assert prefixes == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_head_and_others_can_be_named_in_and_out():
    model = hf("bert-head")
    assert "classifier" not in prunable_layers(model)
    layers = prunable_layers(model, include=("classifier", "*.pooler.dense"), exclude=("*.query",))
    assert layers["classifier"][1] is None
    assert "bert.pooler.dense" in layers
    assert not any(name.endswith("query") for name in layers)


def test_tied_head_named_in_is_refused():
    model = hf("gpt2")
    with pytest.raises(UsageError, match=r"lm_head.*tied to transformer\.wte"):
        prunable_layers(model, include=("lm_head",))


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("lm_haed", "near names: lm_head"),
        ("*.q_porj", r"q_proj"),
        ("model.layers.0.self_attn", r"model\.layers\.0\.self_attn\.\*"),
        ("model.norm", "LlamaRMSNorm"),
    ],
)
@pytest.mark.parametrize("what", ["include", "exclude"])
def test_pattern_that_matches_nothing_names_the_fix(pattern, message, what):
    with pytest.raises(UsageError, match=message) as caught:
        prunable_layers(hf("llama"), **{what: (pattern,)})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pattern_given_as_a_string_is_refused():
    with pytest.raises(UsageError, match="sequence"):
        prunable_layers(hf("llama"), include="lm_head")


def test_plain_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.fc = nn.Linear(8, 4)
            self.classifier = nn.Linear(4, 2)

        def forward(self, x):
            return x

    net = Net()
    assert find_blocks(net) == []
    assert list(prunable_layers(net)) == ["conv", "fc"]
    assert list(prunable_layers(net, include=("classifier",))) == ["conv", "fc", "classifier"]


def test_sequential_is_walked_child_by_child():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [prefix for prefix, _ in find_blocks(net)] == ["0", "1", "2"]
    assert {name: block for name, (_, block) in prunable_layers(net).items()} == {"0": 0, "2": 2}
    assert find_blocks(nn.Sequential(nn.Linear(4, 4))) == []


def test_experts_inside_blocks_are_not_blocks():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList(Expert() for _ in range(2))
            self.out = nn.Linear(4, 4)

    net = Net()
    assert [prefix for prefix, _ in find_blocks(net)] == ["stack.0", "stack.1"]
    assert len(prunable_layers(net)) == 17


def test_nothing_to_prune():
    with pytest.raises(UsageError, match="no layer to prune"):
        prunable_layers(nn.ReLU())
    with pytest.raises(UsageError, match="no layer to prune"):
        prunable_layers(nn.Linear(2, 2), exclude=("*",))


def test_nothing_is_changed():
    model = hf("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prunable_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
