"""Each topology method against a plain enumeration of what its paper says."""

import math

import pytest
import torch
from examples import step_of
from torch import nn

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.methods.weights.gmp import prune_globally
from gossamer.methods.weights.topology import layer_counts


def layers(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        LayerInfo(f"l{i}", shape, None, torch.randn(shape, generator=generator))
        for i, shape in enumerate(shapes)
    ]


def masked(infos, masks):
    return [LayerInfo(x.name, x.shape, None, x.weight * masks[x.name]) for x in infos]


def flat(mask):
    return set(mask.reshape(-1).nonzero().reshape(-1).tolist())


def gradients_of(infos, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {x.name: torch.randn(x.shape, generator=generator) for x in infos}


@pytest.mark.parametrize("allocation", [gs.Uniform(), gs.UniformPlus(), gs.ER(), gs.ERK()])
@pytest.mark.parametrize("density", [0.13, 0.3, 0.77, 1.0])
def test_counts_add_up_to_the_budget(allocation, density):
    infos = layers((7, 11), (13, 5), (3, 17))
    counts = layer_counts(infos, allocation, density)
    assert sum(counts.values()) == math.floor(density * (77 + 65 + 51) + 0.5)
    shares = allocation.allocate(infos, density)
    assert all(abs(counts[x.name] - shares[x.name] * x.size) < 1 + 1e-6 for x in infos)


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    infos = layers((8, 10), (6, 9))
    method, generator = gs.weights.RigL(0.3, every=10, drop=0.4), torch.Generator().manual_seed(0)
    masks = method.start(step_of(0, 100, infos, generator=generator))
    infos, gradients = masked(infos, masks), gradients_of(infos)
    (new,) = method.update(step_of(20, 100, infos, masks, gradients, generator))
    fraction = 0.2 * (1 + math.cos(math.pi * 20 / 75))
    for x in infos:
        w, g = x.weight.reshape(-1).tolist(), gradients[x.name].reshape(-1).tolist()
        active = flat(masks[x.name])
        n = int(fraction * len(active))
        kept = active - set(sorted(active, key=lambda i: abs(w[i]))[:n])
        outside = [i for i in range(len(w)) if i not in kept]
        grown = set(sorted(outside, key=lambda i: -abs(g[i]))[:n])
        assert n > 0 and flat(new[x.name]) == kept | grown
    assert [s for s in range(1, 101) if method.due(s, 100)] == [10, 20, 30, 40, 50, 60, 70]


def test_set_drops_each_sign_apart_and_grows_elsewhere():
    infos = layers((20, 30))
    method, generator = gs.weights.SET(0.2, drop=0.3), torch.Generator().manual_seed(0)
    masks = method.start(step_of(0, 100, infos, generator=generator))
    infos = masked(infos, masks)
    kept, new = method.update(step_of(100, 1000, infos, masks, {}, generator))
    w = infos[0].weight.reshape(-1).tolist()
    active = flat(masks["l0"])
    positive = sorted((i for i in active if w[i] >= 0), key=lambda i: w[i])
    negative = sorted((i for i in active if w[i] < 0), key=lambda i: -w[i])
    gone = set(positive[: int(0.3 * len(positive))]) | set(negative[: int(0.3 * len(negative))])
    assert flat(kept["l0"]) == active - gone
    grown = flat(new["l0"]) - flat(kept["l0"])
    assert len(grown) == len(gone) and not grown & active
    _, other = method.update(step_of(100, 1000, infos, masks, {}, generator))
    assert flat(other["l0"]) != flat(new["l0"])


def test_gmp_follows_the_cubic_and_never_brings_back():
    infos, method = layers((10, 20), (8, 5)), gs.weights.GMP(0.1, every=7, begin=0.1, end=0.8)
    masks = method.start(step_of(0, 100, infos))
    for step in (s for s in range(1, 101) if method.due(s, 100)):
        (new,) = method.update(step_of(step, 100, infos, masks, {}, torch.Generator()))
        density = 0.1 + 0.9 * (1 - (step - 10) / 70) ** 3
        for x in infos:
            assert not (new[x.name] & ~masks[x.name]).any()
            assert abs(int(new[x.name].sum()) - density * x.size) <= 0.5 + 1e-9
            order = sorted(flat(masks[x.name]), key=lambda i: -abs(float(x.weight.reshape(-1)[i])))
            assert flat(new[x.name]) == set(order[: int(new[x.name].sum())])
        masks = new
    assert [int(m.sum()) for m in masks.values()] == [20, 4]


def test_global_pruning_has_one_threshold_and_spares_each_layer_one_weight():
    infos = layers((10, 10), (10, 10))
    infos[1] = LayerInfo("l1", (10, 10), None, infos[1].weight * 1e-6)
    masks = {x.name: torch.ones(10, 10, dtype=torch.bool) for x in infos}
    new = prune_globally(infos, masks, 0.2)
    assert [int(m.sum()) for m in new.values()] == [39, 1]
    assert flat(new["l1"]) == {int(infos[1].weight.abs().argmax())}


def test_granet_prunes_then_regrows_and_new_weights_start_from_zero():
    infos = layers((10, 12), (9, 8))
    method, generator = gs.weights.GraNet(0.1, every=10), torch.Generator().manual_seed(0)
    masks = method.start(step_of(0, 100, infos, generator=generator))
    infos, gradients = masked(infos, masks), gradients_of(infos)
    pruned, new = method.update(step_of(20, 100, infos, masks, gradients, generator))
    density = 0.1 + 0.4 * (1 - 20 / 50) ** 3
    total = sum(int(m.sum()) for m in pruned.values())
    assert total == math.floor(density * 192 + 0.5)
    kept = torch.cat([x.weight.abs()[pruned[x.name]] for x in infos])
    gone = torch.cat([x.weight.abs()[masks[x.name] & ~pruned[x.name]] for x in infos])
    assert kept.min() >= gone.max()
    rate = 0.005 + 0.495 * 0.5 * (1 + math.cos(math.pi * 0.2))
    for x in infos:
        w, g = x.weight.reshape(-1).tolist(), gradients[x.name].reshape(-1).tolist()
        active = flat(pruned[x.name])
        n = math.ceil(rate * len(active))
        stay = active - set(sorted(active, key=lambda i: abs(w[i]))[:n])
        outside = [i for i in range(len(w)) if i not in stay]
        assert flat(new[x.name]) == stay | set(sorted(outside, key=lambda i: -abs(g[i]))[:n])
    assert len(method.update(step_of(70, 100, infos, masks, gradients, generator))) == 1


def test_snip_equals_the_derivative_with_respect_to_a_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    gates = [torch.ones_like(model[i].weight, requires_grad=True) for i in (0, 3)]
    gated = {f"{i}.weight": model[i].weight.detach() * c for i, c in zip((0, 3), gates)}
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    out = torch.func.functional_call(model, {**gated, **buffers}, (x,))
    nn.functional.cross_entropy(out, y).backward()
    model.zero_grad()
    scores = torch.cat([c.grad.abs().reshape(-1) for c in gates])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.sparse_training(
        model, optimizer, gs.weights.SNIP(0.5), total_steps=1,
        loss=lambda: nn.functional.cross_entropy(model(x), y),
    ) as run:  # fmt: skip
        mask = torch.cat([m.reshape(-1) for m in run.masks.values()])
        assert int(mask.sum()) == 36
        assert set(scores.topk(36).indices.tolist()) == flat(mask)
        for key, value in model.named_buffers():
            assert torch.equal(value, before[key])
        assert all(p.grad is None for p in model.parameters())


def test_granet_regrown_weights_are_zero_in_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = gs.weights.GraNet(0.2, every=1, end=0.9)
    with gs.sparse_training(model, optimizer, method, total_steps=10) as run:
        for _ in range(4):
            old = {k: v.clone() for k, v in run.masks.items()}
            optimizer.zero_grad()
            model(torch.randn(8, 12)).square().mean().backward()
            optimizer.step()
            for layer in run.layers:
                new = run.masks[layer.name] & ~old[layer.name]
                assert not layer.weight[new].any()
                assert not optimizer.state[layer.weight]["exp_avg"][new].any()
                assert not optimizer.state[layer.weight]["exp_avg_sq"][new].any()
