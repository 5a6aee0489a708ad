"""A killed run resumes and ends bitwise equal; a journal of another run is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.pattern import NM
from gossamer.engine.prune import run as prune_module
from gossamer.engine.prune.run import prune
from gossamer.methods import methods

METHODS = {x.card.name: x for x in methods(roles=("scorer", "solver")).values()}
KILLED_RUN = """
import contextlib, os, signal, sys, torch
import gossamer.engine.prune.journal as journal_module
import gossamer.engine.prune.run as prune_module
from gossamer.methods import methods

METHODS = {x.card.name: x for x in methods(roles=("scorer", "solver")).values()}

torch.set_num_threads(1)
folder, kill_after, out, where = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

@contextlib.contextmanager
def track(total, enabled, what="pruning"):
    done = [] if total else [None] * 99
    def step(label, advance=1):
        done.extend([label] * advance)
        if advance and where == "step" and len(done) == kill_after:
            die()
    yield step

prune_module.track = track
replace, calls = os.replace, []
def fragile(source, target):
    calls.append(target)
    if where == "rename" and len(calls) == kill_after:
        die()
    replace(source, target)
os.replace = fragile

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(32, 8)
    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)

torch.manual_seed(0)
model, data = Net(), [torch.randn(4, 16, 32) for _ in range(3)]
result = prune_module.prune(model, METHODS["sparsegpt"](), density=0.5, data=data,
    journal=None if folder == "-" else folder)
assert result.provenance["chained"]
print(result.provenance["resumed_units"])
tensors = dict(model.state_dict())
tensors.update({"mask " + k: v.mask for k, v in result.supports.items()})
torch.save(tensors, out)
"""


def start(folder, out, kill_after=0, where="-"):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(folder), str(kill_after), str(out), where],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_killed_runs_resume_bitwise_equal(tmp_path):
    """SIGKILL after the first and second block, and in the middle of writing the third."""
    done = start("-", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "journal"
    # The third run kills itself before the rename of the third block: two are restored.
    for kill_after, where in ((1, "step"), (2, "step"), (1, "rename")):
        killed = start(folder, tmp_path / "never", kill_after, where)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "journal.json",
        "unit-00000.safetensors",
        "unit-00001.safetensors",
    ]
    resumed = start(folder, tmp_path / "resumed")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split()[-1] == "2"
    first, second = (torch.load(tmp_path / name) for name in ("whole", "resumed"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def dies_after(monkeypatch, count):
    class Died(BaseException):
        pass

    original, seen = prune_module._prune_unit, []

    def fragile(*arguments):
        if len(seen) == count:
            raise Died
        seen.append(1)
        return original(*arguments)

    monkeypatch.setattr(prune_module, "_prune_unit", fragile)
    return Died


@pytest.mark.parametrize("family", ["gpt2", "bert", "cnn", "mlp"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_resume_of_every_kind_of_model(tiny, tmp_path, monkeypatch, family, method):
    whole, batches = tiny(family)
    uninterrupted = prune(whole, METHODS[method](), density=0.5, data=batches)
    with monkeypatch.context() as patched:
        died = dies_after(patched, 1)
        with pytest.raises(died):
            prune(tiny(family)[0], METHODS[method](), density=0.5, data=batches, journal=tmp_path)
    again, _ = tiny(family)
    result = prune(again, METHODS[method](), density=0.5, data=batches, journal=tmp_path)
    assert result.provenance["resumed_units"] == 1
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for name, support in uninterrupted.supports.items():
        assert torch.equal(support.mask, result.supports[name].mask)
    assert uninterrupted.layers == result.layers


def test_finished_run_replays(tiny, tmp_path):
    for expected in (0, 2):
        model, batches = tiny("llama")
        result = prune(
            model, METHODS["wanda"](), pattern=NM(2, 4), data=batches, journal=tmp_path / "new"
        )
        assert result.provenance["resumed_units"] == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"density": 0.4}, "density, layers changed"),
        ({"method": METHODS["magnitude"]()}, "data, method, pattern changed|method, pattern"),
        ({"exclude": ("*.q_proj",)}, "layers changed"),
        ({"data": [{"input_ids": torch.zeros(1, 8, dtype=torch.int64)}]}, "data changed"),
    ],
)
def test_another_run_is_refused(tiny, tmp_path, change, message):
    model, batches = tiny("llama")
    arguments = {"method": METHODS["wanda"](), "density": 0.5, "data": batches}
    prune(model, **arguments, journal=tmp_path)
    with pytest.raises(UsageError, match=message):
        prune(tiny("llama")[0], **{**arguments, **change}, journal=tmp_path)


def test_pruned_model_is_refused(tiny, tmp_path):
    model, batches = tiny("llama")
    prune(model, METHODS["wanda"](), density=0.5, data=batches, journal=tmp_path)
    with pytest.raises(UsageError, match=r"model changed; .*dense model"):
        prune(model, METHODS["wanda"](), density=0.5, data=batches, journal=tmp_path)


def finished(tiny, tmp_path):
    model, batches = tiny("mlp")
    prune(model, METHODS["wanda"](), density=0.5, data=batches, journal=tmp_path)
    return tmp_path / "unit-00000.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("unit-00001.safetensors").read_bytes())


def reshape(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({key: value[:-1].clone() for key, value in tensors.items()}, path, metadata)


def forget(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncate, scribble, swap, reshape, forget])
def test_damaged_units_get_one_clear_error(tiny, tmp_path, damage):
    damage(finished(tiny, tmp_path))
    model, batches = tiny("mlp")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FormatError, match="delete the journal") as caught:
        prune(model, METHODS["wanda"](), density=0.5, data=batches, journal=tmp_path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "version": 1, "run": {}}'])
def test_damaged_record(tiny, tmp_path, text):
    finished(tiny, tmp_path)
    (tmp_path / "journal.json").write_text(text)
    model, batches = tiny("mlp")
    with pytest.raises(FormatError, match=r"journal\.json"):
        prune(model, METHODS["wanda"](), density=0.5, data=batches, journal=tmp_path)


def test_folder_with_other_things_is_refused(tiny, tmp_path):
    model, batches = tiny("mlp")
    (tmp_path / "letter.txt").write_text("dear")
    for folder, message in ((tmp_path, "other files"), (tmp_path / "letter.txt", "is a file")):
        with pytest.raises(UsageError, match=message):
            prune(model, METHODS["wanda"](), density=0.5, data=batches, journal=folder)


def test_record_is_plain_json(tiny, tmp_path):
    finished(tiny, tmp_path)
    record = json.loads((tmp_path / "journal.json").read_text())
    assert record["run"]["density"] == 0.5
    assert record["run"]["units"] == ["0", "2"]
