"""Blocks run on their own give what they give inside of the model, or are not run so."""

import copy

import pytest
import torch
from examples import PRUNERS
from torch import nn

from gossamer.engine import hooks
from gossamer.engine.prune import calibrate
from gossamer.engine.prune.calibrate import Calibrator
from gossamer.engine.prune.run import prune
from gossamer.models import choose_weights, find_blocks

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


class Block(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.f, self.inplace = nn.Linear(8, 8), inplace

    def forward(self, x, scale=1.0, bias=None, store=None):
        y = self.f(x) * scale
        if bias is not None:
            y = y + bias
        if store is not None:
            store.append(y)
        return x.add_(y) if self.inplace else x + y


class Net(nn.Module):
    """What differs between blocks is given by `run`."""

    def __init__(self, run, **options):
        super().__init__()
        self.layers, self.run = nn.ModuleList(Block(**options) for _ in range(4)), run

    def forward(self, x):
        return self.run(self.layers, x)


def plain(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def last_differs(layers, x):
    scale = torch.ones(8)
    for layer in layers[:-1]:
        x = layer(x, scale)
    return layers[-1](x, scale * 3)


def each_its_own(layers, x):
    for index, layer in enumerate(layers):
        x = layer(x, scale=torch.full((8,), index + 1.0))
    return x


def by_length(layers, x):
    for index, layer in enumerate(layers):
        x = layer(x, 5.0 if index == 2 and x.shape[1] > 4 else 1.0)
    return x


def from_first(layers, x):
    """A tensor that the first block's output decides, of the kind of encoder states."""
    y = layers[0](x)
    for layer in layers[1:]:
        x = layer(y if layer is layers[1] else x, bias=y.mean(0, keepdim=True))
    return x


def between(layers, x):
    for layer in layers:
        x = layer(x) * 0.5
    return x


def twice(layers, x):
    return plain(layers, plain(layers, x))


def with_store(layers, x):
    store = []
    for layer in layers:
        x = layer(x, store=store)
    return x + store[0]


RUNS = {
    plain: True, last_differs: True, each_its_own: True, by_length: True, from_first: False,
    between: False, twice: False, with_store: None,
}  # fmt: skip
BATCHES = [torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 6, 6)]


def chained_and_whole(model, batches, monkeypatch):
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    one = prune(first, PRUNERS["wanda"](), density=0.5, data=batches)
    probe = calibrate.probe
    with monkeypatch.context() as patched:
        patched.setattr(calibrate, "probe", lambda *a: (probe(*a)[0], False))
        two = prune(second, PRUNERS["wanda"](), density=0.5, data=batches)
    assert two.provenance["chained"] is False
    for name, support in two.supports.items():
        off = (support.mask != one.supports[name].mask).float().mean()
        assert off < 0.005, (name, float(off))
    return one.provenance["chained"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("inplace", [False, True])
def test_chained_or_not_the_statistics_are_those_of_the_model(run, inplace, monkeypatch):
    torch.manual_seed(0)
    chained = chained_and_whole(Net(run, inplace=inplace), BATCHES, monkeypatch)
    if RUNS[run] is not None and not inplace:
        assert chained is RUNS[run]


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "gpt-oss", "swin"])
def test_families_whose_blocks_differ_are_chained(kind, monkeypatch):
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 2}
    ids = [torch.randint(3, 64, (2, n)) for n in (4, 24)]
    match kind:
        case "gemma2":
            config = t.Gemma2Config(**sizes, head_dim=8, sliding_window=8)
            model = t.Gemma2ForCausalLM(config)
        case "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(
                **sizes, use_sliding_window=True, sliding_window=6, max_window_layers=1,
            ))  # fmt: skip
        case "gpt-oss":
            model = t.GptOssForCausalLM(t.GptOssConfig(
                **sizes, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6,
            ))  # fmt: skip
        case "swin":
            ids = [torch.randn(2, 3, 16, 16)]
            model = t.SwinModel(t.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                window_size=4,
            ))  # fmt: skip
    assert chained_and_whole(model.eval(), ids, monkeypatch) is True


def test_a_layer_before_the_blocks_is_pruned_before_they_are_entered(monkeypatch):
    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.net = nn.Linear(8, 8), Net(plain)

        def forward(self, x):
            return self.net(self.front(x))

    torch.manual_seed(0)
    assert chained_and_whole(Front(), BATCHES, monkeypatch) is True


def test_arguments_are_kept_by_reference():
    """Blocks share their masks and rotary tables, so that keeping all arguments costs little."""
    shared = torch.ones(8)

    def run(layers, x):
        for layer in layers:
            x = layer(x, shared)
        return x

    model = Net(run)
    with hooks.evaluating(model):
        calibrator = Calibrator(model, find_blocks(model), choose_weights(model).weights, BATCHES)
    assert all(args[1] is shared for t in calibrator._traces for args, _ in t.arguments)
    assert all(len(trace.hidden) == 1 for trace in calibrator._traces)
