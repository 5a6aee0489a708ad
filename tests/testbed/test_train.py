"""Training the bundled model: it learns, and a run that was killed ends with the same bits."""

import pytest
import torch

from gossamer.testbed import train

pytest.importorskip("transformers")
TEXT = b"import sys\nprint(sys.argv)\n" * 200


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"BATCH": 2, "CONTEXT": 32, "SAVE_EVERY": 4, "WARM_UP": 2}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "build", lambda: train.llama(16, 32, 1, 4, 2, 64))


def run(checkpoint):
    return train.train(TEXT, 10, 3, "cpu", checkpoint, False)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole.pt").state_dict()
    draw, seen = train.windows, []

    def stop(ids, n, length, seed, ahead):
        if len(seen) == 6:
            raise KeyboardInterrupt
        seen.append(seed)
        return draw(ids, n, length, seed, ahead)

    monkeypatch.setattr(train, "windows", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.pt")
    monkeypatch.setattr(train, "windows", draw)
    rest = run(tmp_path / "cut.pt").state_dict()
    assert len(set(seen)) == 6
    assert all(torch.equal(rest[name], value) for name, value in whole.items())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path / "one.pt")
    with pytest.raises(SystemExit, match="--seed"):
        train.train(TEXT, 10, 4, "cpu", tmp_path / "one.pt", False)
