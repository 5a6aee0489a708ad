"""BiFormer's routing: who is chosen, what padding does, and what a mean cannot see."""

import pytest
import torch

import gossamer as gs
from gossamer.methods.attention.biformer import cut, joined
from gossamer.ops.attention import Layout


def layer(**options):
    torch.manual_seed(0)
    return gs.attention.BiFormer(8, 2, **options).eval()


@pytest.mark.parametrize("size", [(6, 9), (7, 7), (5, 2), (1, 1)])
def test_cutting_and_joining_is_the_identity(size):
    x = torch.randn(2, 3, *size)
    parts = cut(x, 3)
    assert parts.shape[:3] == (2, 3, 9)
    assert torch.equal(joined(parts.flatten(2), 3, torch.Size(size)), x)


def test_a_region_is_a_rectangle_of_pixels():
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert cut(x, 2)[0, 0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    padded = cut(torch.ones(1, 1, 7, 7), 3)[0, 0] > 0
    assert padded.sum(1).tolist() == [9, 9, 3, 9, 9, 3, 3, 3, 1]


@torch.no_grad()
def test_two_alike_objects_far_apart_find_each_other():
    """A map of 28 by 28: routing joins the objects' regions, a window of as many keys does not."""
    found = layer(regions=7, routes=2)
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(1, 8, 28, 28, generator=generator)
    object_ = torch.randn(8, 1, 1, generator=generator).sign()
    x[0, :, 0:4, 4:8] += 3 * object_
    x[0, :, 24:28, 20:24] += 3 * object_
    query = key = cut(x, 7)
    routes = found.choose(query, key, torch.ones(49, 16, dtype=torch.bool))
    first, second = 1, 6 * 7 + 5
    assert routes[0, first].nonzero().flatten().tolist() == [first, second]
    assert routes[0, second].nonzero().flatten().tolist() == [first, second]
    window = (torch.arange(49) - first).abs() <= 1
    assert not window[second]


@torch.no_grad()
def test_padding_is_in_no_mean_and_no_softmax():
    found = layer(regions=3, routes=9)
    x = torch.randn(1, 8, 7, 8)
    query, key, _ = (cut(part, 3) for part in found.qkv(x).chunk(3, 1))
    real = cut(torch.ones(1, 1, 7, 8), 3)[0, 0] > 0
    poisoned = found.choose(query + 1e6 * ~real, key, real)
    assert torch.equal(found.choose(query, key, real), poisoned)
    pieces = found(x)
    whole = gs.attention.BiFormer(8, 2, regions=1, routes=1).eval()
    whole.load_state_dict(found.state_dict())
    torch.testing.assert_close(pieces, whole(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_regions_without_a_pixel_are_never_chosen():
    found = layer(regions=7, routes=4)
    real = cut(torch.ones(1, 1, 5, 5), 7)[0, 0] > 0
    assert int(real.any(1).sum()) == 25
    query = cut(torch.randn(1, 8, 5, 5), 7)
    routes = found.choose(query, query, real)[0]
    assert not routes[:, ~real.any(1)].any() and (routes.sum(1) == 4).all()
    assert found(torch.randn(1, 8, 5, 5)).isfinite().all()


@torch.no_grad()
def test_a_mean_hides_a_single_hot_pixel():
    """The weakness that the card names: one strong key among 16 loses to a weak whole region."""
    found = layer(regions=2, routes=1)
    query, key = torch.ones(1, 8, 4, 16), torch.zeros(1, 8, 4, 16)
    key[:, :, 1, 3] = 4.0
    key[:, :, 2] = 0.3
    assert found.choose(query, key, torch.ones(4, 16, dtype=torch.bool))[0, 0].tolist() == [
        False, False, True, False,
    ]  # fmt: skip


def test_routes_are_shared_by_heads_and_have_no_gradient():
    found = layer(regions=3, routes=2)
    query = torch.randn(1, 8, 9, 4, requires_grad=True)
    routes = found.choose(query, query, torch.ones(9, 4, dtype=torch.bool))
    assert routes.shape == (1, 9, 9) and not routes.requires_grad and (routes.sum(-1) == 2).all()
    layout = Layout.from_blocks(routes.unsqueeze(1), 36, 36, 4, 4)
    assert layout.density() == pytest.approx(2 / 9)
