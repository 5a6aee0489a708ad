"""Routing Transformer: clusters, k-means, and outputs that no later token changes."""

import copy

import pytest
import torch
from maps import attended, normal_call
from torch.nn import functional as F

import gossamer as gs


def layer_of(seed=0, **options):
    torch.manual_seed(seed)
    return gs.attention.RoutingTransformer(16, 4, clusters=3, window=6, **options)


def inputs(length=40, batch=2, seed=0):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


def tokens_of(layer, x):
    query = layer.query(x).unflatten(-1, (4, -1)).transpose(1, 2)[:, layer.local :]
    return F.layer_norm(query, query.shape[-1:]).detach()


def mask_of(layer, x):
    """bool (batch, heads, clusters, queries, keys)."""
    call = normal_call(x.shape[1], heads=6, kv_heads=6, batch=len(x))
    return attended(layer.layout(tokens_of(layer, x)), call).unflatten(1, (-1, 3))


def test_clusters_of_a_whole_text_are_balanced_and_causal():
    layer, x = layer_of(whole=True), inputs()
    mask = mask_of(layer, x)
    members = mask.any(-1)
    assert torch.equal(members.sum(-1), torch.full((2, 2, 3), 6))
    assert not mask.triu(1).any() and torch.equal(mask.diagonal(dim1=-2, dim2=-1), members)
    scores = torch.einsum("bhnd,hcd->bhcn", tokens_of(layer, x), layer.means)
    least = scores.masked_fill(~members, torch.inf).amin(-1)
    assert (scores.masked_fill(members, -torch.inf).amax(-1) <= least).all()


def test_a_prefix_decides_alone_unless_the_whole_text_is_asked_for():
    x, other = inputs(), inputs(seed=1)
    changed = torch.cat([x[:, :25], 3 * other[:, 25:]], dim=1)
    for whole in (False, True):
        layer = layer_of(whole=whole).eval()
        same = torch.allclose(layer(x)[:, :25], layer(changed)[:, :25], rtol=1e-4, atol=1e-6)
        assert same != whole
    layer = layer_of().eval()
    for length in (1, 6, 7, 25):
        found = layer(x[:, :length])
        torch.testing.assert_close(found, layer(x)[:, :length], rtol=1e-4, atol=1e-6)


def test_early_tokens_are_in_every_cluster_and_later_ones_in_some():
    members = mask_of(layer_of(), inputs(200)).any(-1)
    assert members[..., :6].all()
    assert 0 < members[..., 100:].float().mean() < 0.2


def test_a_token_in_no_cluster_gets_zero_and_one_in_several_their_mean():
    layer, x = layer_of(local=0, whole=True).eval(), inputs()
    layer.project = torch.nn.Identity()
    inside = mask_of_all(layer, x)
    found = layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
    lost = inside.sum(2) == 0
    assert lost.any() and not found[lost].any()
    first = inside[:, :, :, 0].sum(2)
    value = layer.value(x).unflatten(-1, (4, 4)).transpose(1, 2)[:, :, 0]
    wanted = value * (first / (first + 0.01)).unsqueeze(-1)  # the first token sees itself alone
    torch.testing.assert_close(found[:, :, 0], wanted)


def mask_of_all(layer, x):
    call = normal_call(x.shape[1], heads=12, kv_heads=12, batch=len(x))
    found = attended(layer.layout(tokens_of(layer, x)), call)
    return found.unflatten(1, (4, 3)).any(-1)


def test_centroids_move_by_averages_of_the_nearest_tokens_in_training_only():
    layer, x = layer_of(decay=0.9), inputs()
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.train()(x)
    tokens = tokens_of(layer, x)
    for head in range(2):
        flat = tokens[:, head].flatten(0, 1)
        nearest = torch.cdist(flat, before["means"][head]).argmin(-1)
        counts = torch.stack([(nearest == c).sum() for c in range(3)]).float()
        sums = torch.stack([flat[nearest == c].sum(0) for c in range(3)])
        counts = 0.9 * before["counts"][head] + 0.1 * counts
        sums = 0.9 * before["sums"][head] + 0.1 * sums
        smooth = (counts + 1e-5) / (counts.sum() + 3e-5) * counts.sum()
        torch.testing.assert_close(layer.means[head], sums / smooth[:, None])
    assert not layer.means.requires_grad


def test_commitment_pulls_tokens_to_centroids_and_never_the_other_way():
    layer, x = layer_of(commit=0.5), inputs()
    layer.eval()(x)
    tokens = tokens_of(layer, x)
    distance = torch.stack(
        [torch.cdist(tokens[:, h].flatten(0, 1), layer.means[h]).amin(-1) for h in range(2)]
    )
    wanted = 0.5 * distance.square().mean() / 4  # the mean is over entries, 4 of each token
    torch.testing.assert_close(layer.commitment.detach(), wanted)
    layer.commitment.backward()
    assert layer.query.weight.grad[8:].any() and not layer.query.weight.grad[:8].any()


def test_k_means_finds_planted_directions():
    layer = layer_of(local=2, decay=0.8)
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(3, 16, generator=generator) * 3
    with torch.no_grad():
        layer.query.weight.copy_(torch.eye(16))
    for _ in range(40):
        kind = torch.randint(3, (8, 30), generator=generator)
        layer.train()(directions[kind] + 0.2 * torch.randn(8, 30, 16, generator=generator))
    planted = F.layer_norm(directions.unflatten(-1, (4, 4))[:, 2:], (4,))
    for head in range(2):
        distance = torch.cdist(planted[:, head], layer.means[head]).amin(-1)
        assert (distance < 0.5).sum() >= 2, distance


def test_a_layer_in_training_can_be_copied():
    layer = layer_of().train()
    layer(inputs())
    again = copy.deepcopy(layer)
    assert torch.equal(again.means, layer.means) and not again.commitment.requires_grad
    assert layer.commitment.requires_grad


@pytest.mark.parametrize("window", [1, 39, 40, 500])
def test_any_window(window):
    torch.manual_seed(0)
    layer = gs.attention.RoutingTransformer(16, 4, clusters=2, window=window)
    assert layer(inputs()).isfinite().all()
