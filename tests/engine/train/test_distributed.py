"""Two ranks under torchrun, DDP and FSDP2 over gloo, against one rank on the same global batch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks.py")
SPEC = importlib.util.spec_from_file_location("ranks", SCRIPT)
ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both ranks found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save({name: ranks.first_part(name) for name in ranks.RESUMED}, folder / "one.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(SCRIPT), str(folder)],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same(first, second, tolerance=0.0):
    """Equal supports, counters and generators; weights within the tolerance."""
    for part in ("masks", "ever"):
        assert list(first["run"][part]) == list(second["run"][part])
        for name, mask in first["run"][part].items():
            assert torch.equal(mask, second["run"][part][name]), (part, name)
    for key in ("version", "method", "step", "changed"):
        assert first["run"][key] == second["run"][key], key
    assert torch.equal(first["run"]["generator"], second["run"]["generator"])
    assert first["weights"] and first["weights"].keys() == second["weights"].keys()
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ranks.METHODS)
def test_two_ranks_end_where_one_does(two, name, kind):
    one = ranks.whole_run(name)
    first, second = (out[f"{kind} {name}"] for out in two)
    assert_same(first, second)
    assert_same(first, one, 1e-9)
    assert list(first["run"]["masks"]) == ["0", "4", "6"]
    for key, weight in first["weights"].items():
        assert not weight[~first["run"]["masks"][key]].any()


@pytest.mark.parametrize(
    ("scenario", "more"),
    [
        ("ddp clipped", {"clip": True}),
        ("fsdp clipped", {"clip": True}),
        ("ddp accumulated", {}),
        ("own reduction", {}),
    ],
)
def test_growth_scores_are_those_of_the_global_batch(two, scenario, more):
    first, second = (out[scenario] for out in two)
    assert_same(first, second)
    assert_same(first, ranks.whole_run("rigl", **more), 1e-9)


@pytest.mark.parametrize("name", ranks.RESUMED)
def test_checkpoints_fit_any_number_of_ranks(two, name):
    whole = two[0][f"fsdp {name}"]
    for out in two:
        assert_same(out[f"again {name}"], whole)
        assert_same(out[f"from one {name}"], whole, 1e-9)
        assert_same(out[f"to ddp {name}"], whole, 1e-9)
    part, alone = two[0][f"part {name}"], ranks.first_part(name)
    for key, mask in part["run"]["masks"].items():
        assert torch.equal(mask, alone["run"]["masks"][key])
    assert_same(ranks.second_part(name, part), whole, 1e-9)


def test_what_looks_at_the_loss_says_where_ranks_may_not(two):
    """Synaptic flow is the same on all ranks; second derivatives and sharded weights are not."""
    first, second = (out["ddp synflow"] for out in two)
    assert_same(first, second)
    assert_same(first, ranks.whole_run("synflow"), 1e-9)
    for out in two:
        assert "choose the masks on one rank" in out["refused grasp"]
        assert "these are sharded" in out["refused synflow"]


def test_errors_reach_all_ranks(two):
    for out in two:
        assert "no longer equal" in out["diverged"]
        assert "NaN or infinity" in out["nan"]["said"] and out["nan"]["step"] == 1
        assert "fully_shard" in out["flattened"]
    assert two[1]["nan"]["said"].startswith("NonFiniteError: 4:")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_weights_outside_the_support_of_one_rank_stop_all(two, kind):
    first, second = (out[f"{kind} strayed"] for out in two)
    assert "another rank refuses" in first["said"]
    assert "4: " in second["said"] and "outside the support" in second["said"]
    assert first["step"] == second["step"] == 2
    assert first["dropped"] == 0 < second["dropped"]


def test_a_root_left_gathered_by_an_evaluation_is_sharded_again(two):
    assert_same(two[0]["after evaluation"], ranks.whole_run("set"), 1e-9)
