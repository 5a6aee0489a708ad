"""LoRA on pruned models: the zeros hold, and the merged model is the one that was trained."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), transformers.pytorch_utils.Conv1D(8, 12)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.conv(x.reshape(-1, 2, 2, 2))


def adapted(**more):
    """(the pruned model before LoRA, the same with adapters whose B is not zero)"""
    net = gs.prune(Net(), gs.weights.Magnitude(), density=0.4, data=[X]).model
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second", "conv"], **more)
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(net), config)
    return net, model


def train(model, steps=6):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def zeros(net):
    return {name: p == 0 for name, p in net.named_parameters() if p.dim() > 1}


def test_the_zeros_survive_training_and_merging_and_the_function_stays():
    net, model = adapted()
    before = zeros(net)
    with gs_peft().sparse_lora(model) as masks:
        train(model)
        assert len(masks) == 3
        trained = model(X).detach()
    assert not torch.allclose(trained, model(X), atol=1e-3)  # outside, LoRA is dense again
    dense = copy.deepcopy(model).merge_and_unload()
    merged = gs_peft().merge_sparse(model)
    assert sum(int((z & ~zeros(dense)[n]).sum()) for n, z in before.items()) > 50
    for name, was in before.items():
        assert was.any() and not dict(merged.named_parameters())[name][was].any()
    torch.testing.assert_close(merged(X), trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged(X), net(X), atol=1e-2)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_gradients_are_those_of_the_masked_product():
    _, model = adapted(init_lora_weights=False)
    layer = model.base_model.model.first
    inputs = torch.randn(5, 6)
    with gs_peft().sparse_lora(model):
        layer(inputs).square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = a.grad.clone(), b.grad.clone()
    base = layer.get_base_layer()
    weight = base.weight.detach() + (b @ a) * 2.0 * (base.weight != 0)
    nn.functional.linear(inputs, weight, base.bias).square().sum().backward()
    torch.testing.assert_close(a.grad, 2 * found[0])
    torch.testing.assert_close(b.grad, 2 * found[1])


def test_plain_lora_can_still_be_merged_sparse():
    net, model = adapted()
    train(model)
    with pytest.warns(UserWarning, match="outside the supports"):
        merged = gs_peft().merge_sparse(model)
    for name, was in zeros(net).items():
        assert torch.equal(zeros(merged)[name] & was, was)


def test_disabled_adapters_leave_the_base():
    net, model = adapted(init_lora_weights=False)
    with gs_peft().sparse_lora(model), model.disable_adapter():
        torch.testing.assert_close(model(X), net(X))


@pytest.mark.parametrize("more", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_cannot_be_masked_is_refused(more):
    _, model = adapted(**more)
    with pytest.raises(gs.UsageError, match="plain LoRA"), gs_peft().sparse_lora(model):
        pass


def test_merged_and_dense_models_are_refused():
    _, model = adapted(init_lora_weights=False)
    model.merge_adapter()
    with pytest.raises(gs.UsageError, match="merged already"):
        gs_peft().merge_sparse(model)
    dense = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(gs.UsageError, match="prune"):
        gs_peft().merge_sparse(dense)


def gs_peft():
    from gossamer.integrations import peft

    return peft


def test_adapters_stay_dense_unless_asked_for():
    _, model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with (
        pytest.raises(gs.UsageError, match="sparse_lora"),
        gs.sparse_training(model, optimizer, gs.weights.StaticRandom(0.5), total_steps=2),
    ):
        pass
    base = model.base_model.model.first.base_layer.weight.requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with gs.sparse_training(model, optimizer, gs.weights.StaticRandom(0.5), total_steps=2) as run:
        model(X).square().mean().backward()
        optimizer.step()
    assert list(run.masks) == ["base_model.model.first.base_layer"]
    assert int((base == 0).sum()) >= 36
    for name, parameter in model.named_parameters():
        assert "lora_A" not in name or bool(parameter.all()), name
    with gs.sparse_training(
        model, optimizer, gs.weights.StaticRandom(0.5), total_steps=2, include=("*.lora_A.default",)
    ) as run:
        assert len(run.masks) == 4
