"""The MiniLM encoder at 50%: SparseGPT keeps embeddings closer to dense ones than Magnitude."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def case():
    path = ROOT / "benchmarks" / "cases" / "minilm.py"
    spec = importlib.util.spec_from_file_location("minilm_case", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.models
def test_sparsegpt_beats_magnitude(packaged_folder):
    place = packaged_folder("minilm")
    similarity = case().measure(place, calibration=128, held_out=128)["similarity"]
    for values in similarity.values():
        assert 1.0 > values["sparsegpt"] > values["magnitude"]


def test_sentences_are_split():
    calibration, held_out = case().sentences()
    assert len(calibration) > 500
    assert len(held_out) > 500
    assert not set(calibration) & set(held_out)


def test_record_on_disk_says_so():
    path = ROOT / "benchmarks" / "results" / "minilm.json"
    for values in json.loads(path.read_text())["similarity"].values():
        assert values["sparsegpt"] > values["magnitude"]
