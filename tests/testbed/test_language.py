"""Text as a problem: what depends on which seed, and that a small model learns it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.testbed import heldout_text
from gossamer.testbed.base import Problem
from gossamer.testbed.language import Text

pytest.importorskip("transformers")
TINY = Text(width=16, neurons=32, blocks=1, heads=2, context=16, batch_size=8, held_out=2001)


def test_a_step_depends_on_its_number_and_seed_alone():
    problem: Problem = TINY
    model = problem.build(0)
    later, again = problem.loss(model, 7, 1), problem.loss(model, 7, 1)
    assert torch.equal(later, again)
    assert not torch.equal(later, problem.loss(model, 8, 1))
    assert not torch.equal(later, problem.loss(model, 7, 2))


def test_weights_come_from_the_seed():
    one, same, other = (list(TINY.build(seed).parameters()) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not torch.equal(one[0], other[0])


def test_batches_are_windows_of_the_training_text_and_held_out_windows_join():
    ids, windows = TINY.data
    batch = TINY.batch(3, 0)
    assert batch.shape == (8, 17)
    assert all(bytes(row.tolist()) in bytes(ids.tolist()) for row in batch)
    assert torch.equal(windows[1:, 0], windows[:-1, -1])


def test_the_quality_is_bits_per_byte():
    model = TINY.build(0)
    ids = heldout_text()[:2001]  # the first byte and 125 windows of 16 more
    found = bits_per_byte(model, ids, window=17, encode=list) * len(ids) / (len(ids) - 1)
    assert TINY.quality(model) == pytest.approx(found, rel=1e-5)
    assert TINY.loss(model, 0, 0).item() / math.log(2) == pytest.approx(8, abs=0.5)


def test_an_untrained_model_knows_nothing_and_training_helps():
    model = TINY.build(0)
    before = TINY.quality(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        TINY.loss(model, step, 0).backward()
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert 7.5 < before < 8.5
    assert TINY.quality(model) < 0.7 * before
    assert model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_record_of_the_text_problem_is_what_the_guide_says():
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks" / "results" / "text_problem.json").read_text())
    page = (root / "docs" / "guide" / "testbeds.md").read_text()
    cells = dict(re.findall(r"^\| (.+?) \| ([\d.]+(?: ± [\d.]+)?) \|$", page, re.MULTILINE))
    for steps, found in record["steps"].items():
        (cell,) = [cell for what, cell in cells.items() if f"{steps} steps" in what]
        assert cell == f"{found['mean']:.2f} ± {found['ci95']:.2f}"
    names = {"bigram": "bigram", "trigram": "trigram", "interpolated 5-gram": "ngram5",
             "gzip of the held-out text alone": "gzip_alone"}  # fmt: skip
    for what, key in names.items():
        assert cells[what] == f"{record[key]:.2f}"
    assert record["steps"]["2000"]["mean"] < record["trigram"]
