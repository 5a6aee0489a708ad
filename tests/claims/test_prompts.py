"""What claims about attention measure with: recall at a density, on calls of a dense run."""

import pytest
import torch

import gossamer as gs
from gossamer.attention_comparison import Everything
from gossamer.claims.prompts import CURVES, at, calls, figures
from gossamer.methods import build, find
from gossamer.testbed.maps import hot_call


def test_recall_is_read_between_settings():
    found = [(0.4, 0.8), (0.1, 0.2)]
    assert at(found, 0.2) == pytest.approx(0.5)  # halfway on a logarithmic scale
    assert at(found, 0.05) == 0.2 and at(found, 1.0) == 1.0
    assert 0.8 < at(found, 0.7) < 1
    with pytest.raises(gs.UsageError, match="at most 1"):
        at(found, 1.1)


def test_figures_are_of_the_layout():
    call, _ = hot_call(256)
    assert figures([call], Everything()) == (1.0, pytest.approx(1.0))
    density, recall = figures([call], "streamingllm:window=32,sinks=0,block=16")
    assert density == pytest.approx(sum(min(i + 1, 32) for i in range(256)) / (256 * 257 / 2))
    key = call.query @ call.key.transpose(-1, -2) * call.scale
    place = torch.arange(256)
    behind = place.unsqueeze(1) - place
    weights = key.masked_fill(behind < 0, -torch.inf).softmax(-1)
    assert recall == pytest.approx(float(weights[..., behind < 32].sum() / 256), abs=1e-5)


def test_settings_of_a_curve_keep_more_and_more():
    call, _ = hot_call(512, columns=10)
    for name, settings in CURVES.items():
        densities = [figures([call], setting)[0] for setting in settings]
        assert densities == sorted(densities), name
        assert all(type(build(setting)) is find(name) for setting in settings)


def test_calls_are_those_of_the_layers_asked_for():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    found = calls(model, torch.arange(20).unsqueeze(0), (0, 2))
    assert [call.layer for call in found] == [0, 2] and found[0].queries == 20
