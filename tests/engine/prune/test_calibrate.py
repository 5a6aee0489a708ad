"""Statistics: what they are, behind which weights they are taken, and how many live at once."""

import copy
import gc
import weakref

import pytest
import torch
from examples import PRUNERS
from torch import nn

from gossamer.core.matrix import Weight, inputs_of
from gossamer.core.stats import LayerStats
from gossamer.engine import hooks
from gossamer.engine.data import real_tokens
from gossamer.engine.prune import calibrate
from gossamer.engine.prune.calibrate import Calibrator
from gossamer.engine.prune.run import prune
from gossamer.models import choose_weights, find_blocks

NEEDS = ("norm", "hessian")


def weights_of(model):
    return choose_weights(model).weights


def whole_model_stats(model, layers, batches):
    with hooks.evaluating(model):
        return Calibrator(model, [], layers, batches).gather(layers, None, NEEDS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "vit", "mlp"])
def test_blocks_chain_and_equal_the_whole_model(tiny, family):
    model, batches = tiny(family)
    layers = weights_of(model)
    placed = choose_weights(model).blocks
    whole = whole_model_stats(model, layers, batches)
    with hooks.evaluating(model):
        calibrator = Calibrator(model, find_blocks(model), layers, batches)
        assert calibrator.chained
        for block in sorted({placed[name] for name in layers}):
            own = {name: weight for name, weight in layers.items() if placed[name] == block}
            for name, stats in calibrator.gather(own, block, NEEDS).items():
                assert stats.count == whole[name].count
                torch.testing.assert_close(stats.norm, whole[name].norm, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(stats.hessian, whole[name].hessian, rtol=1e-3, atol=1e-3)


def test_statistics_are_those_of_the_formula(tiny):
    model, batches = tiny("mlp")
    stats = whole_model_stats(model, {"0": Weight(model[0])}, batches)["0"]
    x = torch.cat(batches)
    torch.testing.assert_close(stats.norm, x.norm(dim=0))
    torch.testing.assert_close(stats.hessian, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)
    assert stats.count == len(x)


@pytest.mark.parametrize("family", ["llama", "bert", "cnn", "mlp"])
def test_statistics_come_from_pruned_predecessors(tiny, family, monkeypatch):
    """Each unit's statistics equal those of a model whose earlier units are pruned already."""
    model, batches = tiny(family)
    dense = copy.deepcopy(model)
    seen = {}
    gather = Calibrator.gather

    def spy(self, layers, block, needs):
        whole = Calibrator(self.model, [], layers, batches)
        wanted = gather(whole, layers, None, NEEDS)
        stats = gather(self, layers, block, needs)
        for name, found in stats.items():
            torch.testing.assert_close(found.norm, wanted[name].norm, rtol=1e-4, atol=1e-4)
            seen[name] = found
        return stats

    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "gather", spy)
        prune(model, PRUNERS["wanda"](), density=0.3, data=batches)
    from_dense = whole_model_stats(dense, weights_of(dense), batches)
    last = list(seen)[-1]
    assert not torch.allclose(seen[last].norm, from_dense[last].norm, rtol=1e-3)


def test_blocks_that_cannot_be_chained_are_run_whole(tiny):
    class Skip(nn.Module):
        """Adds the first block's input after the second block: no chain."""

        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            y = torch.relu(self.stack[0](x))
            y = torch.relu(self.stack[1](y)) + x
            return self.stack[2](y)

    torch.manual_seed(0)
    model, batches = Skip(), [torch.randn(8, 16) for _ in range(3)]
    result = prune(model, PRUNERS["sparsegpt"](), density=0.5, data=batches)
    assert result.provenance["chained"] is False
    assert result.measured_density == 0.5


def test_padding_does_not_count(tiny):
    model, batches = tiny("bert")
    name = "encoder.layer.0.attention.self.query"
    stats = whole_model_stats(model, {name: Weight(model.get_submodule(name))}, batches)[name]
    assert stats.count == 4 * (24 + 16)
    assert real_tokens({"attention_mask": torch.ones(2, 3)}) is None


def test_one_block_of_statistics_at_a_time(tiny, monkeypatch):
    model, batches = tiny("llama")
    alive, peak = weakref.WeakSet(), []

    class Counted:
        """Stands in for a Hessian tensor's owner."""

    finish = calibrate.Gatherer.finish

    def counting(self):
        gc.collect()
        stats = finish(self)
        for layer in stats.values():
            token = Counted()
            layer.hessian.owner = token
            alive.add(token)
        peak.append(len(alive))
        return stats

    monkeypatch.setattr(calibrate.Gatherer, "finish", counting)
    prune(model, PRUNERS["sparsegpt"](), density=0.5, data=batches)
    gc.collect()
    assert peak == [7, 7]
    assert len(alive) == 0


def test_recorded_arguments_hold_no_cache(tiny):
    model, batches = tiny("llama")
    with hooks.evaluating(model):
        calibrator = Calibrator(model, find_blocks(model), weights_of(model), batches)
    assert len(calibrator._traces) == len(batches)
    for trace, hidden in zip(calibrator._traces, calibrator._hidden, strict=True):
        assert hidden.shape == (2, 24, 32) and len(trace.arguments) == 2
        for args, kwargs in trace.arguments:
            assert args[0] is None
            assert kwargs["past_key_values"] is None


def test_hooks_leave_nothing_behind(tiny):
    model, batches = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []
    with (
        pytest.raises(ZeroDivisionError),
        hooks.observe_inputs({"q": model.model.layers[0].self_attn.q_proj}, lambda *x: 1 / 0),
    ):
        model(**batches[0])
    with (
        pytest.raises(KeyError),
        hooks.observe_inputs({"q": model.model.layers[0].self_attn.q_proj}, lambda *x: calls),
    ):
        raise KeyError
    with pytest.raises(KeyError), hooks.evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training
    assert torch.is_grad_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_is_never_called_has_no_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    net, batches = Net(), [torch.randn(3, 4)]
    assert list(whole_model_stats(net, weights_of(net), batches)) == ["used"]


def test_conv_rows_are_patches():
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 6)
    stats = whole_model_stats(nn.Sequential(conv), {"0": Weight(conv)}, [x])["0"]
    assert isinstance(stats, LayerStats)
    torch.testing.assert_close(stats.norm, inputs_of(conv, x).norm(dim=0))
