"""A save that is killed leaves the old folder or the new one; packing survives any matrix."""

import os
import stat
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer as gs
from gossamer.core.errors import FormatError
from gossamer.engine.train.checkpoint import write_state
from gossamer.io import atomic
from gossamer.nn import BitmapLinear


def killed_at(step, target):
    """Replace the folder in a child process that dies at its step-th call to the system."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [step]

    def dying(real):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    try:
        atomic.flush = dying(atomic.flush)
        atomic._exchange = dying(atomic._exchange)
        atomic.shutil.rmtree = dying(atomic.shutil.rmtree)
        with atomic.new_folder(target, True) as place:
            (place / "a").write_text("new")
            (place / "b").write_text("new")
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path):
    seen = set()
    for step in range(8):
        target = tmp_path / str(step) / "out"
        target.mkdir(parents=True)
        for name in "ab":
            (target / name).write_text("old")
        code = killed_at(step, target)
        texts = {(target / name).read_text() for name in "ab"}
        assert code in (0, 9) and len(texts) == 1
        seen |= {(code, *texts)}
    assert {(9, "old"), (9, "new"), (0, "new")} <= seen


def test_without_exchange_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    with atomic.new_folder(target, True) as place:
        (place / "a").write_text("new")
    assert (target / "a").read_text() == "new" and os.listdir(tmp_path) == ["out"]


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_what_is_written_follows_the_umask(umask, tmp_path, monkeypatch):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    gs.save(net, tmp_path / "one")
    monkeypatch.setattr(sys.modules["gossamer.io.save"], "LARGEST", 200)
    gs.save(net, tmp_path / "shards")
    write_state(tmp_path / "state", {"a": torch.zeros(3)})
    (tmp_path / "usual").write_text("")
    usual = mode(tmp_path / "usual")
    assert usual == 0o666 & ~umask
    files = [*tmp_path.glob("*/*"), tmp_path / "state"]
    assert len(files) > 4 and {mode(path) for path in files} == {usual}
    assert {mode(tmp_path / name) for name in ("one", "shards")} == {0o777 & ~umask}
    assert not list(tmp_path.rglob(".*")) and os.umask(umask) == umask


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 140), st.floats(0, 1), st.booleans(), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_matrix_round_trips(tmp_path_factory, rows, cols, density, bias, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    matrix = (matrix * (torch.rand(rows, cols, generator=generator) < density)).to(dtype)
    vector = torch.randn(rows, generator=generator).to(dtype) if bias else None
    folder = tmp_path_factory.mktemp("any") / "out"
    gs.save(nn.Sequential(BitmapLinear.from_matrix(matrix, vector)), folder)
    empty = nn.Sequential(nn.Linear(cols, rows, bias=bias, dtype=dtype))
    layer = gs.load(folder, model=empty)[0]
    assert torch.equal(layer.to_matrix(), matrix)
    assert layer.bias is None if vector is None else torch.equal(layer.bias, vector)


def test_a_model_of_another_shape_is_refused_untouched(tmp_path):
    gs.save(nn.Sequential(BitmapLinear.from_matrix(torch.eye(4, 8))), tmp_path / "out")
    other = nn.Sequential(nn.Linear(4, 8, bias=False))
    with pytest.raises(FormatError, match="shape"):
        gs.load(tmp_path / "out", model=other)
    assert isinstance(other[0], nn.Linear)
