"""The whole path on a real model: SmolLM2-135M, which `make test-models` fetches."""

import copy

import pytest
import torch

import gossamer as gs
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.measure.tasks import Subject
from gossamer.engine.serve.generate import generate
from gossamer.testbed import calibration_text, heldout_text
from gossamer.testbed.conversions import causal

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def tokenizer(packaged_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packaged_folder("smollm2"), local_files_only=True)


@pytest.fixture(scope="module")
def dense(packaged_folder):
    return causal(packaged_folder("smollm2")).eval()


def prompt(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids


def test_it_knows_the_capital_of_france(dense, tokenizer):
    ids = prompt(tokenizer, "The capital of France is")
    found = generate(dense, ids, max_new_tokens=4)
    assert "Paris" in tokenizer.decode(found[0])


def test_sparsegpt_loses_least_and_the_folder_serves_what_was_pruned(dense, tokenizer, tmp_path):
    text = heldout_text()[:6000]
    ids = prompt(tokenizer, calibration_text()[:20000].decode(errors="ignore"))[0, : 8 * 256]
    data = [{"input_ids": part} for part in ids.view(-1, 256).split(4)]
    bits = {"dense": bits_per_byte(dense, text, encode=Subject(dense, tokenizer).encode)}
    for method in (gs.weights.Magnitude(), gs.weights.SparseGPT()):
        model = copy.deepcopy(dense)
        result = gs.prune(model, method, density=0.5, data=data)
        assert abs(result.measured_density - 0.5) < 1e-3
        bits[result.method] = bits_per_byte(model, text, encode=Subject(dense, tokenizer).encode)
    assert bits["dense"] < bits["sparsegpt"] < bits["magnitude"]
    assert bits["dense"] < 1.1 and bits["sparsegpt"] < 1.3 * bits["dense"]
    ids = prompt(tokenizer, "The module defines the following functions:")
    masked = generate(model, ids, max_new_tokens=16)
    gs.save(gs.compress(result), tmp_path / "small")
    assert torch.equal(generate(gs.load(tmp_path / "small"), ids, max_new_tokens=16), masked)
