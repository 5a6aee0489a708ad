"""Initialisers that rewrite the base, and adapters other than plain LoRA, over pruned models."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gossamer as gs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def pruned():
    return gs.prune(Net(), gs.weights.Magnitude(), density=0.5)


def adapt(net, config):
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(net), config)


def lora(**more):
    more = {"r": 2, "lora_alpha": 4, "target_modules": ["first", "second"], **more}
    return peft.LoraConfig(**more)


def train(model, steps=4):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def merge(*args):
    from gossamer.integrations.peft import merge_sparse

    return merge_sparse(*args)


def inside(*args):
    from gossamer.integrations.peft import sparse_lora

    return sparse_lora(*args)


def assert_zeros_hold(net, merged):
    now = dict(merged.named_parameters())
    for name, p in net.named_parameters():
        assert not now[name][p == 0].any(), name


REWRITERS = ["pissa", "pissa_niter_4", "olora", "OLoRA"]


@pytest.mark.parametrize("init", REWRITERS)
def test_rewritten_bases_are_refused_by_name(init):
    model = adapt(pruned().model, lora(init_lora_weights=init))
    with pytest.raises(gs.UsageError, match=f"{init}.*masks="), inside(model):
        pass
    with pytest.raises(gs.UsageError, match=f"{init}.*masks="):
        merge(model)
    assert hasattr(model, "peft_config")  # nothing was merged


def test_initialisers_that_need_data_or_bits_are_refused_too():
    model = adapt(pruned().model, lora())
    for init in ("corda", "loftq", "lora_ga"):
        model.peft_config["default"].init_lora_weights = init
        with pytest.raises(gs.UsageError, match=init):
            merge(model)
    for init in ("eva", "orthogonal", "gaussian", True, False):
        model.peft_config["default"].init_lora_weights = init
        with inside(model):
            pass


@pytest.mark.parametrize("form", ["result", "supports", "tensors"])
@pytest.mark.parametrize("init", REWRITERS)
def test_with_masks_from_before_they_train_the_sparse_model(init, form):
    result = pruned()
    masks = {
        "result": result,
        "supports": dict(result.supports),
        "tensors": {n: p != 0 for n, p in ((k, result.model.get_submodule(k).weight)
                                           for k in result.supports)},
    }[form]  # fmt: skip
    model = adapt(result.model, lora(init_lora_weights=init))
    with inside(model, masks):
        torch.testing.assert_close(model(X), result.model(X), rtol=1e-4, atol=1e-5)
        train(model)
        trained = model(X).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge(model, masks)
    assert_zeros_hold(result.model, merged)
    torch.testing.assert_close(merged(X), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(X), result.model(X), atol=1e-2)


def test_masks_that_fit_nothing_are_refused():
    result = pruned()
    model = adapt(result.model, lora(init_lora_weights="pissa"))
    with pytest.raises(gs.UsageError, match="names no layer"), inside(model, {"x": X > 0}):
        pass
    with pytest.raises(gs.UsageError, match="first: the mask is"), inside(model, {"first": X > 0}):
        pass
    with pytest.raises(gs.UsageError, match="supports or masks"), inside(model, result.model):
        pass


def test_a_drop_is_said_with_its_share_and_none_is_not():
    net = pruned().model
    model = adapt(net, lora())
    train(model)
    plain = copy.deepcopy(model).merge_and_unload()
    change = plain.first.weight - net.first.weight, plain.second.weight - net.second.weight
    masks = net.first.weight != 0, net.second.weight != 0
    outside = sum(float(c[~m].square().sum()) for c, m in zip(change, masks, strict=True))
    share = (outside / sum(float(c.square().sum()) for c in change)) ** 0.5
    with pytest.warns(UserWarning, match=f"dropped {share:.0%} of what the adapters change"):
        merged = merge(model)
    assert_zeros_hold(net, merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(adapt(net, lora()))  # B is zero: nothing to drop
        model = adapt(net, lora())
        with inside(model):
            train(model)
            merge(copy.deepcopy(model))
        merge(copy.deepcopy(model))
    train(model)
    with pytest.warns(UserWarning, match="not lastly"):
        merge(model)


KINDS = {
    "rslora": lambda: lora(use_rslora=True),
    "bias": lambda: lora(lora_bias=True),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=100, target_modules=["first", "second"]
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_additive_kinds_merge_to_what_was_trained(name):
    net = pruned().model
    model = adapt(net, KINDS[name]())
    with inside(model):
        train(model)
        model.eval()
        trained = model(X).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge(model)
    assert_zeros_hold(net, merged)
    torch.testing.assert_close(merged(X), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, net(X), atol=1e-3)


def test_two_active_adapters_are_masked_together():
    net = pruned().model
    model = adapt(net, lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False, r=3))
    model.base_model.set_adapter(["default", "other"])
    with inside(model):
        both = model(X).detach()
    torch.testing.assert_close(merge(model)(X), both, rtol=1e-4, atol=1e-5)


def test_a_batch_that_mixes_adapters_is_refused():
    model = adapt(pruned().model, lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    with inside(model), pytest.raises(gs.UsageError, match="mixes adapters"):
        model.eval()(X, adapter_names=["default", "other"] * 8)


OTHERS = {
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["first", "second"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["first", "second"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["first", "second"]),
    "dora": lambda: lora(use_dora=True),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["first", "second"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_refused_in_training_and_merge_with_a_word(name):
    net = pruned().model
    model = adapt(net, OTHERS[name]())
    with pytest.raises(gs.UsageError, match="plain LoRA"), inside(model):
        pass
    train(model)
    with pytest.warns(UserWarning, match="dropped"):
        merged = merge(model)
    assert_zeros_hold(net, merged)


def test_ia3_scales_and_so_loses_nothing():
    net = pruned().model
    config = peft.IA3Config(target_modules=["first", "second"], feedforward_modules=[])
    model = adapt(net, config)
    train(model)
    trained = model(X).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge(model)
    assert_zeros_hold(net, merged)
    torch.testing.assert_close(merged(X), trained)


def test_trained_copies_of_sparse_layers():
    net = pruned().model
    model = adapt(net, lora(target_modules=["first"], modules_to_save=["second", "head"]))
    with pytest.raises(gs.UsageError, match=r"second.*modules_to_save"), inside(model):
        pass
    train(model)
    with pytest.warns(UserWarning, match="dropped"):
        merged = merge(model)
    assert_zeros_hold(net, merged)
    dense = adapt(net, lora(modules_to_save=["head"]))
    with inside(dense) as masks:
        train(dense)
        trained = dense(X).detach()
    assert len(masks) == 2
    torch.testing.assert_close(merge(dense)(X), trained, rtol=1e-4, atol=1e-5)


def test_adapters_of_bare_parameters_are_refused():
    net = pruned().model
    config = lora(target_modules=[], target_parameters=["first.weight"])
    model = adapt(net, config)
    for use in (lambda: inside(model).__enter__(), lambda: merge(model)):
        with pytest.raises(gs.UsageError, match="acts on weight of Linear"):
            use()


def test_padding_entries_are_no_sparsity():
    net = pruned().model
    net.words = nn.Embedding(200, 8, padding_idx=0)
    model = adapt(net, lora(target_modules=["first", "words"]))
    with inside(model) as masks:
        assert [name.rpartition(".")[2] for name in masks] == ["first"]
