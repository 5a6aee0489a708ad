"""The callbacks on two ranks under torchrun, against one rank on the same global batch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning.pytorch")

SCRIPT = Path(__file__).with_name("ranks.py")
SPEC = importlib.util.spec_from_file_location("callback_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both ranks found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(SCRIPT), str(folder)],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same(one, other, tolerance=0.0):
    assert one["run"]["step"] == other["run"]["step"] == ranks.STEPS
    for part in ("masks", "ever"):
        for name, mask in one["run"][part].items():
            assert torch.equal(mask, other["run"][part][name]), (part, name)
    for name, weight in one["model"].items():
        torch.testing.assert_close(weight, other["model"][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ranks.METHODS)
@pytest.mark.parametrize("kind", ["transformers", "lightning"])
def test_two_ranks_end_where_one_does(two, kind, name, tmp_path):
    first, second = (out[f"{kind} {name}"] for out in two)
    assert_same(first, second)
    train = ranks.with_transformers if kind == "transformers" else ranks.with_lightning
    assert_same(first, train(name, tmp_path, 1), 1e-9)


def test_two_ranks_resume_from_a_checkpoint(two):
    for out in two:
        assert_same(out["transformers resumed"], out["transformers rigl"])
