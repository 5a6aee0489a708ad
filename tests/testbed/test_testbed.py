"""The bundled model is well trained, its texts are honest, and its data is what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.core.errors import UsageError
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.testbed import (
    baselines,
    calibration_batches,
    calibration_text,
    corpus,
    digits,
    heldout_text,
    language_model,
)


def test_the_model_is_trained():
    text = heldout_text()[:40_000]
    dense = bits_per_byte(language_model(), text)
    assert dense < baselines.ngram_bits_per_byte(text, calibration_text())
    assert dense < baselines.xz_bits_per_byte(heldout_text())  # longer text is easier for xz
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "testbed.json"
    record = json.loads(results.read_text())
    assert record["dense"] < min(record["xz"], record["ngram5"])
    assert record["ngram5_training_bytes"] == record["train"]["training_bytes"]
    assert dense == pytest.approx(record["dense_first_40000_bytes"], abs=1e-3)
    torch.manual_seed(0)
    untrained = language_model()
    untrained.apply(lambda m: m.reset_parameters() if isinstance(m, torch.nn.Linear) else None)
    assert dense < 0.5 * bits_per_byte(untrained, text[:4000])


def test_ngram_model_is_a_distribution_and_learns():
    text = b"abracadabra " * 50
    assert baselines.ngram_bits_per_byte(text, text) < 0.7
    alphabet = bytes(range(256))
    history = b"abcabcabd"
    total = 0.0
    for byte in alphabet:
        # the probability of one byte after `ab`: the last of three bits-per-byte terms
        three = baselines.ngram_bits_per_byte(b"ab" + bytes([byte]), history, order=3) * 3
        two = baselines.ngram_bits_per_byte(b"ab", history, order=3) * 2
        total += 2 ** -(three - two)
    assert total == pytest.approx(1.0, abs=1e-9)


def test_xz_of_noise_and_of_repeats():
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    assert baselines.xz_bits_per_byte(noise) > 7.9
    # xz copies at most 273 bytes at a time: some 73 matches of a few bytes each
    assert baselines.xz_bits_per_byte(noise, primer=noise) < 0.2


def test_split_is_by_file_and_disjoint(tmp_path):
    docs, stdlib = tmp_path / "docs", tmp_path / "lib"
    (docs / "deep").mkdir(parents=True)
    (stdlib / "test").mkdir(parents=True)
    for index in range(300):
        (docs / "deep" / f"{index}.rst.txt").write_text(f"page {index}")
    (stdlib / "a.py").write_text("a = 1")
    (stdlib / "test" / "b.py").write_text("b = 1")
    files = corpus.read(docs, stdlib)
    assert "stdlib/a.py" in files and not any("b.py" in name for name in files)
    held = sum(corpus.is_held_out(name) for name in files)
    assert 0 < held < 20
    train, heldout = corpus.split(files)
    assert not set(train.split(b"\n")) & set(heldout.split(b"\n"))
    with pytest.raises(UsageError, match="--docs"):
        corpus.read(stdlib, stdlib)


def test_calibration_windows():
    batches = calibration_batches(n=10, length=32, batch=4, seed=3)
    assert [b["input_ids"].shape for b in batches] == [(4, 32), (4, 32), (2, 32)]
    again = calibration_batches(n=10, length=32, batch=4, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again))
    assert bytes(batches[0]["input_ids"][0].tolist()) in calibration_text()
    assert calibration_text()[:2000] not in heldout_text()
    with pytest.raises(UsageError, match="holds 5 tokens"):
        calibration_batches(length=32, text=b"short")


def test_digits():
    pytest.importorskip("sklearn")
    x, y, held_x, held_y = digits()
    assert x.shape[1:] == (1, 8, 8) and x.max() == 1.0 and len(x) + len(held_x) == 1797
    assert set(y.tolist()) == set(held_y.tolist()) == set(range(10))
