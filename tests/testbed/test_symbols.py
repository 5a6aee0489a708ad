"""The language of symbols: prompts are exact and answerable, training resumes, the models solve it."""

import json
import random
from importlib import resources

import pytest
import torch

from gossamer.core.errors import UsageError
from gossamer.testbed import symbol_model, symbols, train_symbols
from gossamer.testbed.symbols import ASK, IGNORED, NAMES, NUMBERS, SET, TALLY, Content, SymbolTask
from gossamer.testbed.train_symbols import Stage

pytest.importorskip("transformers")


def answered(ids):
    """The answer to every question, by reading the prompt."""
    links, found = {}, {}
    for place, symbol in enumerate(ids):
        if symbol == SET:
            links[ids[place + 1]] = ids[place + 2]
        if symbol == ASK:
            name = ids[place + 1]
            while name in NAMES:
                name = links[name]
            found[place + 1] = name
        if symbol == TALLY:
            first = min(i for i, s in enumerate(ids) if s in (ASK, TALLY))
            found[place + 1] = NUMBERS[ids[:first].count(ids[place + 1])]
    return found


@pytest.mark.parametrize("length", [120, 500])
def test_prompts_have_their_length_and_answers_follow_from_them(length):
    rng = random.Random(length)
    content = Content(hops=(0, 2, 1), counts=(3, 8), asked=5)
    made = [symbols.prompt(length, content, rng) for _ in range(20)]
    for one in made:
        assert len(one.ids) == len(one.answers) == len(one.known) == length
        wanted = {i: a for i, a in enumerate(one.answers) if a != IGNORED}
        assert wanted == answered(one.ids) and len(wanted) == 5
        assert all(one.ids[i + 1] == a for i, a in wanted.items())
    assert len({one.ids for one in made}) == 20


def test_what_is_known_at_a_statement_is_in_no_symbol_but_the_first():
    one = symbols.prompt(60, Content(hops=(2,), asked=1), random.Random(0))
    ends = [i + 2 for i, s in enumerate(one.ids) if s == SET]
    assert len(ends) == 3 and len({one.known[i] for i in ends}) == 1
    assert one.known[ends[0]] == one.ids[ends[0]]
    assert all(one.ids[i] in NAMES for i in ends[1:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="symbols more than"):
        symbols.prompt(20, Content(hops=(2, 2), asked=1), random.Random(0))
    with pytest.raises(UsageError, match="at most 48 names"):
        Content(hops=(3,) * 20)
    with pytest.raises(UsageError, match="1 to 8"):
        Content(counts=(9,), asked=1)
    with pytest.raises(UsageError, match="questions need"):
        Content(hops=(0,), asked=2)
    with pytest.raises(UsageError, match="tasks are"):
        SymbolTask("needles")


def test_a_task_is_the_same_for_the_same_seed():
    task = SymbolTask("multi-hop", 200, 3)
    ids, answers = task.batch(1)
    assert ids.shape == (3, 200) and int((answers != IGNORED).sum()) == 12
    assert torch.equal(ids, task.batch(1)[0]) and not torch.equal(ids, task.batch(2)[0])


def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_symbols, "WIDTH", 16)
    monkeypatch.setattr(train_symbols, "SAVE_EVERY", 4)
    stages = (Stage((48,), 2, 6), Stage((48, 96), 1, 4, falls=True))
    whole = train_symbols.train(3, tmp_path / "whole.pt", stages)[0].state_dict()
    made, seen = train_symbols.batch, []

    def stop(stage, seed):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(seed)
        return made(stage, seed)

    monkeypatch.setattr(train_symbols, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        train_symbols.train(3, tmp_path / "cut.pt", stages)
    monkeypatch.setattr(train_symbols, "batch", made)
    rest, run = train_symbols.train(3, tmp_path / "cut.pt", stages)
    assert run.total == 10 and len(set(seen)) == 5
    assert all(torch.equal(rest.state_dict()[name], value) for name, value in whole.items())


def test_the_bundled_model_solves_what_its_record_says():
    place = resources.files("gossamer.testbed") / "data" / "symbols" / "train.json"
    said = json.loads(place.read_text())["quality"]
    model = symbol_model()
    for name in ("needle", "multi-hop", "counting"):
        found = symbols.accuracy(model, SymbolTask(name, 512, 8), 77)
        assert abs(found - said[f"{name} 512"]) < 0.25, (name, found)  # 32 questions
    assert said["needle 512"] > 0.95 and said["needle 1024"] > 0.95
