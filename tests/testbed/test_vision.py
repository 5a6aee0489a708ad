"""The digits as a problem: what depends on which seed, and that a network learns them."""

import torch
from torch import nn

from gossamer.testbed.base import Problem
from gossamer.testbed.vision import Digits


def test_a_step_depends_on_its_number_and_seed_alone():
    problem: Problem = Digits(split=3)
    model = problem.build(0)
    later, again = problem.loss(model, 7, 1), problem.loss(model, 7, 1)
    assert torch.equal(later, again)
    assert not torch.equal(later, problem.loss(model, 8, 1))
    assert not torch.equal(later, problem.loss(model, 7, 2))


def test_weights_come_from_the_seed_and_the_split_does_not_matter():
    one, other = Digits(split=0).build(5), Digits(split=1).build(5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert not torch.equal(one[1].weight, Digits().build(6)[1].weight)


def test_held_out_digits_are_in_no_batch():
    problem = Digits(split=2)
    images, labels, held, _ = problem.data
    assert len(images) + len(held) == 1797 and len(held) == 449
    rows, _ = problem.batch(0, 0)
    known = {image.numpy().tobytes() for image in images}
    assert all(row.numpy().tobytes() in known for row in rows)
    assert problem.batch(0, 0)[1].dtype == labels.dtype


def test_shapes_follow_the_widths():
    model = Digits(widths=(32, 16), norm=True).build(0)
    kinds = [type(layer) for layer in model]
    assert kinds == [
        nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU,
        nn.Linear,
    ]  # fmt: skip
    assert [layer.weight.shape for layer in model if isinstance(layer, nn.Linear)] == [
        (32, 64), (16, 32), (10, 16)
    ]  # fmt: skip


def test_training_raises_the_quality_and_measuring_changes_nothing():
    problem = Digits(widths=(32,), norm=True)
    model = problem.build(0)
    before = problem.quality(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(60):
        optimizer.zero_grad()
        problem.loss(model, step, 0).backward()
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert before < 0.4 < 0.8 < problem.quality(model)
    assert model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
