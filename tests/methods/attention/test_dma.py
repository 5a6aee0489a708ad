"""DMA: which keys a query is given, what the gate learns, and decoding as training."""

import pytest
import torch
from maps import attended, normal_call

import gossamer as gs
from gossamer.methods.attention.running import lists_of, running_top


def layer_of(keys=6, slope=1.0, **options):
    torch.manual_seed(0)
    layer = gs.attention.DMA(16, 4, kv_heads=2, keys=keys, **options)
    with torch.no_grad():
        layer.slope.fill_(slope)
    return layer


def inputs(length=40, batch=2, seed=0):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


def mask_of(layer, x):
    call = normal_call(x.shape[1], heads=4, kv_heads=2, batch=len(x))
    return attended(layer.layout(layer.bias(x)), call)


@pytest.mark.parametrize("count", [1, 5, 200])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_best_of_every_prefix(count, rows):
    scores = torch.randn(2, 3, 60, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    offsets, tokens = lists_of(running_top(scores, count, rows))
    assert offsets.shape == (2, 3, 61)
    for b in range(2):
        for h in range(3):
            for row in range(60):
                begin, end = offsets[b, h, row], offsets[b, h, row + 1]
                ranked = sorted(range(row + 1), key=lambda j: (-float(scores[b, h, j]), -j))
                assert tokens[begin:end].tolist() == sorted(ranked[:count])


def test_nothing_of_size_length_times_length_is_made():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(found):
                self.most = max(self.most, x.numel() if isinstance(x, torch.Tensor) else 0)
            return found

    with Largest() as largest:
        lists_of(running_top(torch.randn(1, 1, 512), 8))
    assert largest.most <= 4 * 512 * 8


def test_early_queries_have_keys_and_every_query_no_more_than_it_may():
    mask = mask_of(layer_of(), inputs())
    counts = torch.arange(1, 41).clamp(max=6)
    assert torch.equal(mask.sum(-1), counts.expand(2, 4, -1))


def test_what_follows_never_changes_an_output():
    layer, x = layer_of().eval(), inputs()
    whole = layer(x)
    for length in (1, 5, 6, 7, 23):
        torch.testing.assert_close(layer(x[:, :length]), whole[:, :length], rtol=1e-4, atol=1e-6)


def test_an_untrained_layer_is_a_window_and_its_slope_learns():
    layer = layer_of(slope=0.0)
    place = torch.arange(40)
    window = (place <= place[:, None]) & (place > place[:, None] - 6)
    assert torch.equal(mask_of(layer, inputs()), window.expand(2, 4, -1, -1))
    layer(inputs()).square().sum().backward()
    assert layer.slope.grad.all() and not layer.importance.weight.grad.any()


def test_no_more_keys_than_the_layer_takes_are_all_attended():
    layer = layer_of(keys=40)
    assert torch.equal(mask_of(layer, inputs())[0, 0], torch.ones(40, 40, dtype=torch.bool).tril())


def test_the_gate_goes_by_values_and_its_gradient_by_the_logits():
    layer, x = layer_of().double(), inputs().double()
    before = layer.bias(x)
    with torch.no_grad():
        layer.key.weight.mul_(3)
        layer.query.weight.mul_(3)
    assert torch.equal(layer.bias(x), before)
    # Raising one key's projection changes the loss by the gradient that the gate is given.
    bias = layer.bias(x).detach()
    grad = {}
    layer.bias = lambda x: grad.setdefault("bias", bias.clone().requires_grad_())
    loss = layer(x).square().sum()
    loss.backward()
    key = (0, 1, 3)
    moved = bias.clone()
    moved[key] += 1e-6
    layer.bias = lambda x: moved
    change = (layer(x).square().sum() - loss).item() / 1e-6
    assert change == pytest.approx(grad["bias"].grad[key].item(), rel=1e-3, abs=1e-6)
    assert grad["bias"].grad[key] != 0


def test_the_gate_learns_to_keep_the_key_that_is_asked_for():
    """One loud value among 64 is asked for at the end; a window of 4 does not hold it."""
    torch.manual_seed(0)
    layer = gs.attention.DMA(16, 2, keys=4)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(3)

    def batch():
        x = 0.3 * torch.randn(16, 40, 16, generator=generator)
        at = torch.randint(4, 30, (16,), generator=generator)
        sign = torch.randint(0, 2, (16,), generator=generator) * 2.0 - 1
        x[torch.arange(16), at, 0] = 3.0
        x[torch.arange(16), at, 1] = 3.0 * sign
        return x, at, sign

    def loss_of():
        x, _, sign = batch()
        return (layer(x)[:, -1, 0] - sign).square().mean()

    first = sum(loss_of().item() for _ in range(5)) / 5
    for _ in range(200):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    last = sum(loss_of().item() for _ in range(5)) / 5
    x, at, _ = batch()
    mask = attended(layer.layout(layer.bias(x)), normal_call(40, heads=2, kv_heads=2, batch=16))
    kept = mask[torch.arange(16), :, -1, at].any(-1)
    assert first > 0.8 and last < 0.3 and kept.float().mean() > 0.9, (first, last, kept)
