"""Training state through one file: the same tensors, numbers and keys, or one clear error."""

import json

import pytest
import torch
from safetensors.torch import save_file

import gossamer as gs
from gossamer.engine.train.checkpoint import (
    FORMAT,
    random_state,
    read_state,
    set_random_state,
    write_state,
)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_optimizers_and_runs_hold_comes_back(tmp_path):
    shared = torch.arange(6.0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with gs.sparse_training(model, optimizer, gs.weights.SRSTE(), total_steps=3) as run:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    state = {
        "optimizer": {"state": optimizer.state_dict()["state"]},
        "run": run.state_dict(),
        "random": random_state(),
        "more": [
            shared,
            shared[1:3],
            torch.tensor(True),
            torch.empty(0),
            None,
            1,
            0.1,
            True,
            "x",
            {},
        ],
        3: {"-1": 1e-300},
    }
    write_state(tmp_path / "deep" / "a.safetensors", state)
    assert same(state, read_state(tmp_path / "deep" / "a.safetensors"))
    first = torch.rand(3)
    set_random_state(read_state(tmp_path / "deep" / "a.safetensors")["random"])
    assert torch.equal(first, torch.rand(3))


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_state(path, {"x": 1})
    for bad in ({"x": object()}, {(1, 2): 3}, {"x": b"1"}):
        with pytest.raises(gs.UsageError):
            write_state(path, bad)
    assert read_state(path) == {"x": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "structure",
    [
        "[1]", "{", "7", '{"tensor": "9"}', '{"dict": 3}', '{"dict": [[[1], 2]]}', '{"code": []}',
        '{"list": [' * 40 + "1" + "]}" * 40,
    ],
)  # fmt: skip
def test_damaged_files_are_one_error(structure, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"0": torch.ones(1)}, path, {"format": FORMAT, "structure": structure})
    with pytest.raises(gs.FormatError):
        read_state(path)


def test_other_files_are_refused(tmp_path):
    save_file({"0": torch.ones(1)}, tmp_path / "b", {"structure": json.dumps({"dict": []})})
    (tmp_path / "c").write_bytes(b"junk")
    for name in ("b", "c", "missing"):
        with pytest.raises(gs.FormatError):
            read_state(tmp_path / name)
