"""Pruning whole models: exact counts, what stays untouched, errors before any change."""

import copy

import pytest
import torch
from examples import PRUNERS
from torch import nn

from gossamer.core.allocation import OWL, Uniform
from gossamer.core.density import kept_count
from gossamer.core.errors import NonFiniteError, PatternError, UsageError
from gossamer.core.matrix import as_matrix
from gossamer.core.pattern import NM, Block, Unstructured
from gossamer.engine.prune.run import prune
from gossamer.engine.serve.compress import compress
from gossamer.models import prunable_layers
from gossamer.ops.allocation import Global

Magnitude, Random, Wanda, SparseGPT = (
    PRUNERS[name] for name in ("magnitude", "random", "wanda", "sparsegpt")
)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return all(torch.equal(after[key], value) for key, value in before.items())


def run(model, batch):
    model.eval()
    with torch.no_grad():
        output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("method", sorted(PRUNERS))
@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=["half", "2:4"])
def test_every_family_and_method(tiny, family, method, pattern):
    model, batches = tiny(family)
    before, chosen = snapshot(model), prunable_layers(model)
    flags = [module.training for module in model.modules()]
    density = None if pattern else 0.5
    result = prune(model, PRUNERS[method](), pattern=pattern, density=density, data=batches)

    assert result.model is model
    assert list(result.supports) == list(chosen) == [record.name for record in result.layers]
    for name, (module, _) in chosen.items():
        matrix, support = as_matrix(module), result.supports[name]
        assert not bool((matrix * ~support.mask).any())
        if pattern:
            groups = support.mask.reshape(-1, 4).sum(dim=1)
            assert bool((groups == 2).all())
        assert support.count == matrix.numel() // 2
    assert result.measured_density == 0.5
    weights = {f"{name}.weight" for name in chosen}
    for key, value in model.state_dict().items():
        assert key in weights or torch.equal(value, before[key]), key
    if method != "sparsegpt":
        for name, (module, _) in chosen.items():
            kept = torch.where(module.weight != 0, before[f"{name}.weight"], module.weight)
            assert torch.equal(kept, module.weight), name
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert bool(torch.isfinite(run(model, batches[0])).all())


def test_conv1d_agrees_with_linear(tiny):
    """GPT-2's transposed layers and equal Linear layers get transposed masks and weights."""
    model, batches = tiny("gpt2")
    twin = copy.deepcopy(model)
    for name, (module, _) in prunable_layers(model).items():
        linear = nn.Linear(*module.weight.shape)
        linear.weight.data = module.weight.data.t().clone()
        linear.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, linear)
    for method in (Wanda(), SparseGPT()):
        first, second = copy.deepcopy(model), copy.deepcopy(twin)
        masks = prune(first, method, density=0.5, data=batches).supports
        others = prune(second, method, density=0.5, data=batches).supports
        # Sums run in another order, so a near tie may fall differently: almost all must agree.
        for name, support in masks.items():
            same = (support.mask == others[name].mask).float().mean()
            assert same > 0.995, (name, float(same))


def test_default_pattern_and_bfloat16(tiny):
    for method in (Wanda(), SparseGPT()):
        model, batches = tiny("llama")
        model = model.to(torch.bfloat16)
        result = prune(model, method, density=0.25, data=batches)
        assert result.measured_density == 0.25
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert bool(torch.isfinite(run(model, batches[0])).all())


def test_head_named_in_comes_last(tiny):
    model, batches = tiny("llama")
    result = prune(model, SparseGPT(), density=0.5, data=batches, include=("lm_head",))
    assert result.supports["lm_head"].density == 0.5


def test_patch_embedding_named_in_comes_first(tiny):
    model, batches = tiny("vit")
    name = "vit.embeddings.patch_embeddings.projection"
    twin = copy.deepcopy(model)
    result = prune(model, Wanda(), density=0.5, data=batches, include=(name,))
    by_hand = prune(
        twin, Wanda(), density=0.5, data=batches, include=(name,), exclude=("vit.layers*",)
    )
    assert torch.equal(by_hand.supports[name].mask, result.supports[name].mask)
    after = prune(twin, Wanda(), density=0.5, data=batches)
    for layer, support in after.supports.items():
        assert torch.equal(support.mask, result.supports[layer].mask), layer


@pytest.mark.parametrize("allocation", [Uniform(), Global(), OWL()])
def test_allocations(tiny, allocation):
    model, batches = tiny("llama")
    result = prune(model, Wanda(), density=0.5, allocation=allocation, data=batches)
    total = sum(support.mask.numel() for support in result.supports.values())
    kept = sum(support.count for support in result.supports.values())
    assert result.measured_density == kept / total
    assert abs(result.measured_density - 0.5) < 0.02
    for record in result.layers:
        support = result.supports[record.name]
        wanted = kept_count(support.mask.numel(), record.requested_density)
        assert abs(support.count - wanted) <= support.mask.shape[0]


def test_global_scope(tiny):
    model, _ = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data *= 10
    result = prune(model, Magnitude(), pattern=Unstructured(scope="global"), density=0.5)
    assert result.measured_density == 0.5
    densities = {name: support.density for name, support in result.supports.items()}
    assert densities["model.layers.0.mlp.up_proj"] > 0.9
    for method in (Wanda(), SparseGPT()):
        with pytest.raises(PatternError, match=r"allocation=Global\(\)"):
            prune(model, method, pattern=Unstructured(scope="global"), density=0.5, data=[1])


ERRORS = [
    ({"density": 1.5}, UsageError, r"\(0, 1\]"),
    ({"density": 0.0}, UsageError, r"\(0, 1\]"),
    ({"density": float("nan")}, UsageError, r"\(0, 1\]"),
    ({}, UsageError, "needs a density"),
    ({"pattern": NM(2, 4), "density": 0.3}, UsageError, "leave density out"),
    ({"pattern": NM(2, 4), "allocation": Global()}, UsageError, "Global"),
    ({"pattern": NM(5, 10)}, PatternError, r"model\.layers\.0\.self_attn\.q_proj"),
    ({"pattern": Block(3, 1), "density": 0.5}, PatternError, r"model\.layers\.0"),
    ({"density": 0.5, "data": None}, UsageError, "Wanda|SparseGPT"),
    ({"density": 0.5, "data": []}, UsageError, "empty"),
    ({"density": 0.5, "data": [{}]}, UsageError, "empty"),
    ({"density": 0.5, "data": [3]}, UsageError, "batch 0 is a int"),
    ({"density": 0.5, "data": {"input_ids": 1}}, UsageError, r"\[batch\]"),
    ({"density": 0.5, "include": ("nothing",)}, UsageError, "near names"),
]


@pytest.mark.parametrize("arguments, error, message", ERRORS)
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_errors_leave_the_model_untouched(tiny, method, arguments, error, message):
    model, batches = tiny("llama")
    before = snapshot(model)
    if arguments.get("pattern") == Block(3, 1) and method is Wanda:
        message += "|does not admit"
    with pytest.raises(error, match=message) as caught:
        prune(model, method(), **{"data": batches, **arguments})
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)
    assert model.training


def test_methods_without_needs_take_no_data(tiny):
    for method in (Magnitude(), Random(seed=3)):
        model, _ = tiny("bert")
        assert prune(model, method, density=0.5).measured_density == 0.5
    with pytest.raises(UsageError, match="OWL"):
        prune(model, Magnitude(), density=0.5, allocation=OWL())


def test_not_a_method(tiny):
    model, _ = tiny("mlp")
    with pytest.raises(UsageError, match="instance"):
        prune(model, Magnitude, density=0.5)
    with pytest.raises(UsageError, match="not a pruning method"):
        prune(model, object(), density=0.5)


def test_nan_weights_and_activations_are_named(tiny):
    model, batches = tiny("llama")
    before = snapshot(model)
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        prune(broken, Magnitude(), density=0.5)
    model.model.layers[0].post_attention_layernorm.weight.data[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.(gate|up)_proj"):
        prune(model, Wanda(), density=0.5, data=batches)
    before["model.layers.0.post_attention_layernorm.weight"][0] = float("inf")
    assert unchanged(model, before)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_same_result_twice(tiny, family):
    first, batches = tiny(family)
    second = copy.deepcopy(first)
    for model in (first, second):
        prune(model, SparseGPT(), density=0.5, data=iter(batches))
    assert unchanged(first, second.state_dict())


def test_progress_goes_to_stderr(tiny, capfd, monkeypatch):
    monkeypatch.setattr("gossamer.engine.progress._WORTH", 0.0)
    model, _ = tiny("mlp")
    prune(model, Magnitude(), density=0.5, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "pruning" in err


def test_an_embedding_can_be_named_in():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(UsageError, match=r"embed_tokens.*Magnitude"):
        prune(model, PRUNERS["wanda"](), density=0.5, include=("*embed_tokens",), data=[before])
    assert torch.equal(model.model.embed_tokens.weight, before)
    result = prune(
        model,
        PRUNERS["magnitude"](),
        density=0.25,
        include=("*embed_tokens",),
        exclude=("*layers*",),
    )
    kept = model.model.embed_tokens.weight != 0
    assert list(result.supports) == ["model.embed_tokens"] and int(kept.sum()) == 50 * 32 // 4
    assert before.abs()[kept].min() >= before.abs()[~kept].max()
    fast = compress(result)
    record = next(layer for layer in fast.layers if layer.name == "model.embed_tokens")
    assert record.kernel is None and "looks rows up" in record.reason
