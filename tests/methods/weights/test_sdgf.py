"""SdGf: the frames, the forward pass in each of them, and the two gradients."""

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn.packed.nm import NMLinear

TOTAL = 20


def test_the_frames_are_the_published_ones():
    ratios = lambda method: [(x.keep, x.group) for x in method.frames]  # noqa: E731
    assert ratios(gs.weights.SdGf(gs.NM(1, 16))) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert ratios(gs.weights.SdGf(gs.NM(2, 4))) == [(3, 4), (2, 4)]
    assert ratios(gs.weights.SdGf(gs.NM(1, 4), "geometric")) == [(8, 32), (4, 16), (2, 8), (1, 4)]
    for keep, group in ((1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (2, 32)):
        found = ratios(gs.weights.SdGf(gs.NM(keep, group), "geometric"))
        assert found == [(8 * keep, 8 * group), (4 * keep, 4 * group), (2 * keep, 2 * group),
                         (keep, group)]  # fmt: skip


@pytest.mark.parametrize("pattern", [(1, 8), (1, 16), (2, 8)], ids=str)
def test_geometric_decay_trains_the_patterns_of_the_paper(pattern):
    method = gs.weights.SdGf(gs.NM(*pattern), "geometric", begin=0.1, end=0.9)
    torch.manual_seed(0)
    layer = nn.Linear(2 * 8 * pattern[1], 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    seen = set()
    with gs.sparse_training(layer, optimizer, method, total_steps=TOTAL, include=("",)) as run:
        for step in range(TOTAL):
            if step >= 2:
                frame = method.frame(step, TOTAL)
                seen.add((frame.keep, frame.group))
                counts = (layer.weight.detach() != 0).reshape(-1, frame.group).sum(1)
                assert (counts == frame.keep).all()
            optimizer.zero_grad()
            layer(torch.randn(8, layer.in_features)).square().mean().backward()
            optimizer.step()
    assert seen == {(k * pattern[0], k * pattern[1]) for k in (8, 4, 2, 1)}
    assert run.density == pattern[0] / pattern[1]
    packed = NMLinear.from_matrix(layer.weight.detach(), layer.bias, f"{pattern[0]}:{pattern[1]}")
    assert torch.equal(packed.to_matrix(), layer.weight.detach())
    with pytest.raises(gs.UsageError, match="M in"):
        NMLinear.from_matrix(layer.weight.detach(), layer.bias, "8:64")


def test_equal_frames_between_the_dense_phase_and_the_end():
    method = gs.weights.SdGf(gs.NM(1, 8), begin=0.2, end=0.8)  # 7:8, 4:8, 2:8, 1:8, 12 steps
    found = [method.frame(step, TOTAL).keep for step in range(4, TOTAL + 1)]
    assert found == [7] * 3 + [4] * 3 + [2] * 3 + [1] * 8
    assert not method.due(3, TOTAL) and method.due(4, TOTAL)


@pytest.mark.parametrize("gradient", ["masked", "straight"])
def test_equals_a_loop_that_masks_by_hand(gradient):
    torch.manual_seed(0)
    layer = nn.Linear(16, 3, bias=False).double()
    hidden = layer.weight.detach().clone()
    method = gs.weights.SdGf(gs.NM(1, 4), gradient=gradient, begin=0.1, end=0.7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with gs.sparse_training(layer, optimizer, method, total_steps=TOTAL, include=("",)):
        for step in range(TOTAL):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).double()
            keep = 4 if step < 2 else method.frame(step, TOTAL).keep
            order = hidden.reshape(3, 4, 4).abs().argsort(dim=2, descending=True)
            mask = torch.zeros(3, 4, 4, dtype=torch.bool)
            mask = mask.scatter(2, order[..., :keep], True).reshape(3, 16)
            torch.testing.assert_close(layer.weight.detach(), hidden * mask, rtol=1e-9, atol=1e-12)
            assert not layer.weight[~mask].any()
            seen = (hidden * mask).requires_grad_()
            grad = torch.autograd.grad((x @ seen.t()).square().mean(), seen)[0]
            hidden = hidden - 0.1 * (grad if gradient == "straight" else grad * mask)
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()


def test_what_it_refuses():
    for bad in ({"pattern": gs.NM(3, 8)}, {"begin": 0.9}, {"decay": "x"}, {"gradient": "x"}):
        with pytest.raises(gs.UsageError):
            gs.weights.SdGf(**bad)
    with pytest.raises(gs.UsageError, match="at most 1249"):
        gs.weights.SdGf(gs.NM(1, 2048), "geometric")
    layer = nn.Linear(16, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    run = gs.SparseRun(layer, optimizer, gs.weights.SdGf(gs.NM(1, 4), "geometric"), TOTAL, ("",))
    with pytest.raises(gs.PatternError, match="divisible by 32"):
        run.start()
