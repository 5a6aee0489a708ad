"""Outer loops: what IMP rewinds to, what a soup is, and what is refused."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.engine.train.fit import Fit, TrainingOptions

TOTAL = 6


def build(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.ReLU(), nn.Linear(12, 3)
    )


def batch(step, member=0):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1000 * member + step))
    return x, x[:, :3].argmax(1)


class Train:
    """A training that records what it was asked for and what it was given and made."""

    def __init__(self, sparse=True):
        self.calls, self.given, self.made, self.sparse = [], [], [], sparse

    def __call__(self, model, trainer, part):
        self.calls.append((part.index, part.member, part.first, part.last))
        self.given.append(copy.deepcopy(model.state_dict()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        steps = range(part.first, TOTAL if part.last is None else part.last)
        if self.sparse:
            with gs.sparse_training(model, optimizer, trainer, total_steps=TOTAL):
                self.steps(model, optimizer, steps, part.member)
        else:
            self.steps(model, optimizer, steps, part.member)
        self.made.append(copy.deepcopy(model.state_dict()))

    def steps(self, model, optimizer, steps, member):
        for step in steps:
            x, y = batch(step, member)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def largest(state, count):
    flat = torch.cat([state["0.weight"].flatten(), state["3.weight"].flatten()]).abs()
    return flat >= flat.topk(count).values[-1]


def flat_mask(result):
    return torch.cat([s.mask.flatten() for s in result.supports.values()])


@pytest.mark.parametrize("rewind", [0, 2])
def test_imp_rewinds_everything_but_the_support(rewind):
    model, train = build(), Train()
    first = copy.deepcopy(model.state_dict())
    result = gs.train_rounds(model, gs.weights.IMP(0.25, rounds=2, rewind=rewind), train)
    dense = [(0, 0, 0, 2), (0, 0, 2, None)] if rewind else [(0, 0, 0, None)]
    assert train.calls == [*dense, (1, 0, rewind, None), (2, 0, rewind, None)]
    early = train.made[0] if rewind else first
    for given, source, count in zip(train.given[-2:], train.made[-3:-1], (54, 27)):
        keep = largest(source, count)
        for name, value in given.items():
            if name not in ("0.weight", "3.weight"):
                assert torch.equal(value, early[name]), name
        flat = torch.cat([given["0.weight"].flatten(), given["3.weight"].flatten()])
        want = torch.cat([early["0.weight"].flatten(), early["3.weight"].flatten()])
        assert torch.equal(flat, want * keep)
    assert torch.equal(flat_mask(result), largest(train.made[-2], 27))
    assert result.densities == (1.0, 54 / 108, 27 / 108)
    assert not torch.cat([model[0].weight.flatten(), model[3].weight.flatten()])[~keep].any()


def test_a_soup_is_the_mean_of_copies_with_statistics_taken_anew():
    model, train = build(), Train()
    data = [batch(step)[0] for step in range(4)]
    result = gs.train_rounds(model, gs.weights.SparseModelSoups(0.2, 2, 3), train, data=data)
    assert [call[:2] for call in train.calls] == [
        (0, 0),
        *((i, m) for i in (1, 2) for m in range(3)),
    ]
    for name, value in train.given[-1].items():
        assert torch.equal(value, train.given[-2][name]) and torch.equal(
            value, train.given[-3][name]
        )
    for name in ("0.weight", "1.weight", "3.bias"):
        members = torch.stack([state[name] for state in train.made[-3:]])
        assert members.std(0).max() > 0
        torch.testing.assert_close(model.state_dict()[name], members.mean(0))
    inputs = [model[0](x).detach() for x in data]
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    var = torch.stack([x.var(0) for x in inputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert result.densities[-1] == round(0.2 * 108) / 108
    assert int(flat_mask(result).sum()) == 22
    assert model.training


def test_a_greedy_soup_leaves_out_what_makes_it_worse():
    model, train = build(norm=False), Train()

    def evaluate(model):
        """Nearness to the second copy: averaging anything else with it can only do harm."""
        second = train.made[-2]["0.weight"] if len(train.made) >= 4 else None
        return -float((model[0].weight.detach() - second).abs().sum())

    gs.train_rounds(model, gs.weights.SparseModelSoups(0.5, 1, 3), train, evaluate=evaluate)
    assert torch.equal(model[0].weight, train.made[-2]["0.weight"])


def test_keep_holds_the_zeros_of_a_pruned_model_through_decay_and_momentum():
    model = build()
    gs.prune(model, gs.weights.Magnitude(), density=0.3, include=("3",))
    zeros = model[0].weight == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with gs.sparse_training(model, optimizer, gs.weights.FixedMasks(), total_steps=5) as run:
        Train().steps(model, optimizer, range(5), 0)
    assert run.density == pytest.approx(0.3, abs=0.01)
    assert torch.equal(model[0].weight == 0, zeros) and int(zeros.sum()) > 40


METHODS = {
    "imp": lambda: gs.weights.IMP(0.25, rounds=2, rewind=2),
    "soups": lambda: gs.weights.SparseModelSoups(0.25, rounds=2, members=2),
}


def noisy():
    """With dropout, so that the state of torch's generator matters."""
    return nn.Sequential(*build()[:3], nn.Dropout(0.3), build()[3])


def in_rounds(model, method, folder, kill=(), stop=None):
    """The loop over Fit, checkpoints every second step. kill: (part, step) to die at."""
    taken = []

    def train(model, trainer, part):
        def loss(model, step):
            x, y = batch(step, part.member)
            return nn.functional.cross_entropy(model(x), y)

        def report(fit):
            taken.append((part.index, part.member, fit.step))
            if taken[-1] == kill:
                stop()

        fit = Fit(
            model, trainer, loss, TrainingOptions(TOTAL, 0.2), first=part.first, last=part.last
        )
        fit.train(part.checkpoint, {"part": [part.index, part.member]}, 2, report)

    data = [batch(step)[0] for step in range(4)]
    result = gs.train_rounds(model, METHODS[method](), train, data=data, checkpoint=folder)
    return result, taken


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill", [(0, 0, 5), (1, 0, 5), (2, 0, 6), (2, 1, 5)])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_inside_a_round_and_resumed_is_bitwise_equal(name, kill, tmp_path):
    if name == "imp" and kill[1]:
        return
    whole, model = noisy(), noisy()
    torch.manual_seed(7)
    want, every = in_rounds(whole, name, None)

    def stop():
        raise Killed

    torch.manual_seed(7)
    with pytest.raises(Killed):
        in_rounds(model, name, tmp_path, kill, stop)
    again = noisy()
    torch.manual_seed(8)
    found, taken = in_rounds(again, name, tmp_path)
    saved = (*kill[:2], kill[2] - 1 - (kill[2] - 1) % 2)  # the last one written
    assert taken == every[every.index(saved) + 1 :]
    assert found.densities == want.densities
    assert torch.equal(flat_mask(found), flat_mask(want))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    result, taken = in_rounds(noisy(), name, tmp_path)
    assert not taken and result.densities == want.densities, "finished already"


def test_a_process_killed_inside_a_round_goes_on_where_it_was(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import torch, test_rounds as t;"
        "torch.set_num_threads(int(sys.argv[3]));"  # by which sums round differently
        "model = t.noisy(); torch.manual_seed(7);"
        "t.in_rounds(model, 'imp', sys.argv[2], (2, 0, 5),"
        " lambda: os.kill(os.getpid(), signal.SIGKILL))"
    )
    folder, threads = tmp_path / "loop", str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(folder), threads],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    whole, again = noisy(), noisy()
    torch.manual_seed(7)
    in_rounds(whole, "imp", None)
    _, taken = in_rounds(again, "imp", folder)
    assert taken == [(2, 0, 5), (2, 0, 6)]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_the_folder_of_another_loop_is_refused(tmp_path):
    in_rounds(noisy(), "imp", tmp_path)
    with pytest.raises(gs.UsageError, match="another method"):
        in_rounds(noisy(), "soups", tmp_path)
    other = noisy()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(gs.UsageError, match="initial model"):
        in_rounds(other, "imp", tmp_path)


def test_bad_input():
    with pytest.raises(gs.UsageError, match="data="):
        gs.train_rounds(build(), gs.weights.SparseModelSoups(0.5), Train())
    with pytest.raises(gs.UsageError, match="outside the support"):
        gs.train_rounds(build(), gs.weights.IMP(0.5, 1), Train(sparse=False))
    with pytest.raises(gs.UsageError, match="include"):
        gs.train_rounds(build(), gs.weights.IMP(0.5, 1), Train(), exclude=("3",))
    for bad in (
        lambda: gs.weights.IMP(0.0),
        lambda: gs.weights.IMP(0.1, rounds=0),
        lambda: gs.weights.IMP(0.1, rewind=-1),
        lambda: gs.weights.SparseModelSoups(0.1, members=0),
    ):
        with pytest.raises(gs.UsageError):
            bad()
