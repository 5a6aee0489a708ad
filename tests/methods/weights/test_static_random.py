"""StaticRandom: the counts of its allocation or of SNIP, at places of its own."""

import pytest
import torch
from torch import nn

import gossamer as gs


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def first_masks(method, seed=0):
    model = build()
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.sparse_training(
        model, optimizer, method, total_steps=1, include=("*",), seed=seed,
        loss=lambda: nn.functional.cross_entropy(model(x), torch.arange(32) % 5),
    ) as run:  # fmt: skip
        return {name: mask.clone() for name, mask in run.masks.items()}


def test_resampling_keeps_the_counts_and_forgets_the_places():
    snip = first_masks(gs.weights.SNIP(0.3))
    method = gs.weights.StaticRandom(0.3, resample=gs.weights.SNIP(0.3))
    one, other = first_masks(method), first_masks(method, seed=1)
    counts = {name: int(mask.sum()) for name, mask in snip.items()}
    assert {name: int(mask.sum()) for name, mask in one.items()} == counts
    assert {name: int(mask.sum()) for name, mask in other.items()} == counts
    assert len({count / snip[name].numel() for name, count in counts.items()}) == 3
    for name, mask in one.items():
        assert not torch.equal(mask, snip[name]) and not torch.equal(mask, other[name])


def test_erk_plus_leaves_the_classifier_dense():
    masks = first_masks(gs.weights.StaticRandom(0.3, gs.ERKPlus()))
    assert masks["4"].all() and not masks["0"].all()
    assert sum(int(m.sum()) for m in masks.values()) == round(0.3 * (360 + 600 + 100))


def test_what_it_refuses():
    for other in (gs.weights.SNIP(0.2), gs.weights.GraSP(0.2), gs.weights.RigL(0.3), 0.3):
        with pytest.raises(gs.UsageError, match=r"SNIP\(0\.3\) or GraSP\(0\.3\)"):
            gs.weights.StaticRandom(0.3, resample=other)
    method = gs.weights.StaticRandom(0.3, resample=gs.weights.SNIP(0.3))
    with pytest.raises(gs.UsageError, match="leave it out"):
        method.counts([])
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = gs.SparseRun(model, optimizer, method, 1, ("*",))
    with pytest.raises(gs.UsageError, match="pass loss="):
        run.start()
