"""Speeds say whether the machine was calm, what sparsity alone gives, and count inputs rightly."""

import collections
import itertools

import pytest
import torch
from torch import nn

from gossamer.engine.data import rows_of
from gossamer.engine.measure import calm, evaluate
from gossamer.engine.measure.calm import watched_rounds
from gossamer.engine.measure.evaluate import embedding_similarity, encode_speed


def states(monkeypatch, values):
    found = iter(values)
    monkeypatch.setattr(calm, "calm", lambda peak=0.0: next(found))


def numbered():
    count = itertools.count(1)
    return lambda: {"a": float(next(count))}


def test_disturbed_rounds_are_taken_again(monkeypatch):
    states(monkeypatch, [1, 1, 0.3, 1, 1, 1])
    found = watched_rounds(numbered(), 2, 60.0)
    assert found.seconds == {"a": [1.0, 4.0]} and found.disturbed == 0


def test_a_busy_machine_is_told_and_does_not_hold_up(monkeypatch):
    monkeypatch.setattr(calm, "calm", lambda peak=0.0: 0.3)
    seen = []
    found = watched_rounds(numbered(), 3, 60.0, seen.append)
    assert len(seen) == 6 and found.disturbed == 3 and len(found.seconds["a"]) == 3
    assert "machine busy in 6 of 6" in seen[-1]
    assert len(watched_rounds(numbered(), 3, 0.0).seconds["a"]) == 3


def test_a_mapping_that_is_no_dict_counts_its_rows():
    class Encoding(collections.UserDict):
        pass

    ids = torch.ones(32, 8)
    assert rows_of(Encoding(x=ids, mask=ids)) == rows_of({"x": ids}) == rows_of(ids) == 32
    assert rows_of({"scale": torch.tensor(2.0), "x": ids}) == 32


def test_the_gain_is_that_in_the_same_loop(monkeypatch):
    monkeypatch.setattr(calm, "calm", lambda peak=0.0: 1.0)
    watched = calm.Watched(
        {"dense": [8.0, 8.0, 8.0], "dense_compiled": [2.0, 3.0, 2.0], "sparse": [1.0, 1.0, 2.0]}, 1
    )
    speed = evaluate._speed(watched, 4, "tokens/s", "compiled")
    assert speed.gain == 2.0 and (speed.gain_low, speed.gain_high) == (1.0, 3.0)
    assert speed.ratio == 8.0 and speed.disturbed == 1 and speed.repeats == 3
    plain = encode_speed(nn.Linear(4, 4), nn.Linear(4, 4), [torch.randn(6, 4)], 2)
    assert plain.gain == plain.ratio and plain.disturbed == 0 and plain.dense > 0


@pytest.mark.parametrize("form", ["logits", "tuple", "tensor"])
def test_models_with_a_head_are_compared_by_what_they_put_out(form):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            out = self.layer(x)
            forms = {"logits": type("Out", (), {"logits": out})(), "tuple": (out, 1), "tensor": out}
            return forms[form]

    torch.manual_seed(0)
    first, second = Head(), Head()
    same = embedding_similarity(first, first, [torch.randn(5, 4)])
    assert (
        same == pytest.approx(1.0) and embedding_similarity(first, second, [torch.randn(5, 4)]) < 1
    )
