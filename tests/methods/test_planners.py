"""Every planner on every family: an ordinary smaller model that plain transformers reloads."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from examples import PLANNERS

import gossamer as gs

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 4}
FAMILIES = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**GATED)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**GATED)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**GATED, head_dim=8)),
    "phi3": lambda t: t.Phi3ForCausalLM(t.Phi3Config(**GATED)),
    "opt": lambda t: t.OPTForCausalLM(
        t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip
BOTH, NEURONS = ("neurons", "heads"), ("neurons",)
CASES = [
    (family, name, kinds)
    for family in FAMILIES
    for name in PLANNERS
    for kinds in ((BOTH, NEURONS) if family in ("llama", "qwen2", "qwen3") else (NEURONS,))
]
IDS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family](transformers).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@dataclass(frozen=True)
class Only:
    """A planner that cuts these kinds, whatever else it could; planners need no such option."""

    planner: Any
    kinds: tuple[str, ...]

    @property
    def card(self):
        return self.planner.card

    def keep(self, width, count):
        return self.planner.keep(width, count)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def silenced(model, method, density):
    """The given model with what readers take from units that go set to zero."""
    from gossamer.core.width import Width
    from gossamer.models.widths import find_widths

    model = copy.deepcopy(model)
    for kind in method.kinds:
        for width in find_widths(model, kind):
            weights = {}
            for slot in width.slots:
                weight = model.get_submodule(slot.layer).weight.detach()
                weight = weight.t() if hasattr(model.get_submodule(slot.layer), "nf") else weight
                rows = weight if slot.writes else weight.t()
                weights[slot.layer] = rows[slot.index].flatten(1)
            keep = method.keep(
                Width(width.name, kind, width.units, weights), round(density * width.units)
            )
            reader = width.slots[-1]
            assert not reader.writes
            module = model.get_submodule(reader.layer)
            gone = reader.index[~keep].flatten()
            columns = module.weight.data.t() if not hasattr(module, "nf") else module.weight.data
            columns[gone] = 0
    return model


@pytest.mark.parametrize(("family", "name", "kinds"), CASES)
def test_the_smaller_model_equals_the_silenced_one_and_reloads(family, name, kinds, tmp_path):
    model, method = build(family), Only(PLANNERS[name](), kinds)
    want = logits(silenced(model, method, 0.5))
    size = sum(p.numel() for p in model.parameters())
    result = gs.prune(model, method, density=0.5)
    assert result.model is model and result.measured_density == 0.5
    assert any(" neurons stay in each layer" in note for note in result.notes)
    assert sum(p.numel() for p in model.parameters()) < size
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    config = again.config
    if family in ("llama", "qwen2", "qwen3"):
        assert config.intermediate_size == 24
        if "heads" in kinds:
            assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
            assert config.head_dim == (8 if family == "qwen3" else 4)
    if family not in ("opt", "gpt2"):
        generated = model.generate(IDS[:, :3], max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, again.generate(IDS[:, :3], max_new_tokens=4, do_sample=False))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", PLANNERS)
def test_it_can_be_cut_again_and_pruned_and_saved(name, tmp_path):
    model = build("llama")
    gs.prune(model, PLANNERS[name](), sparsity=0.5)
    gs.prune(model, PLANNERS[name](), density=0.5)
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (2, 12)
    gs.save(gs.prune(model, "magnitude", density=0.5), tmp_path / "out")
    assert torch.equal(logits(gs.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_heads_that_the_config_cannot_say_are_refused(family):
    model, before = build(family), build(family).state_dict()
    with pytest.raises(gs.UsageError, match=r"kinds="):
        gs.prune(model, "widths", density=0.5)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert model.config.num_attention_heads in (4, 8)


def test_refusals_come_before_anything_changes():
    model = build("llama")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    odd = build("llama")
    mlp = odd.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(32, 20), torch.nn.Linear(32, 20)
    mlp.down_proj = torch.nn.Linear(20, 32)
    nan = build("llama")
    nan.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    tied = build("llama")
    tied.model.layers[0].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    for match, given, more in [
        ("pattern cannot apply", model, {"pattern": "2:4"}),
        ("data cannot apply", model, {"data": [IDS]}),
        ("allocation cannot apply", model, {"allocation": "erk"}),
        ("needs a density", model, {"density": None}),
        ("density", model, {"density": 1.5}),
        (r"\[20, 48\] neurons", odd, {}),
        (r"layers\.1\.mlp\.up_proj: its weight holds NaN", nan, {}),
        ("tied to", tied, {}),
        ("no config of transformers", torch.nn.Linear(4, 4), {}),
        ("where it keeps neurons is not known", transformers.BertModel(
            transformers.BertConfig(**{**SMALL, "pad_token_id": 0}, intermediate_size=48)), {}),
    ]:  # fmt: skip
        with pytest.raises(gs.UsageError, match=match):
            gs.prune(given, gs.weights.Widths(), **{"density": 0.5, **more})
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert model.config.to_dict() == config
    for bad in ({"scorer": gs.weights.Wanda()}, {"kinds": ()}, {"kinds": ("rows",)}):
        with pytest.raises(gs.UsageError, match="Widths"):
            gs.weights.Widths(**bad)


def test_magnitude_keeps_the_largest_and_random_does_not():
    model = build("llama")
    gate = model.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate[5] *= 100
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] *= 100  # queries of head pair 1
    row, columns = gate[5].clone(), model.model.layers[0].self_attn.o_proj.weight[:, 8:16].clone()
    gs.prune(model, "widths", density=1 / 48)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, row.unsqueeze(0))
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, columns)
