"""DRSformer's channel attention: what it keeps, and what mixing does."""

import pytest
import torch
from torch.nn import functional as F

import gossamer as gs
from gossamer.methods.attention.drsformer import SHARES, MixedScaleFeedForward, kept


def layer(channels=24, heads=2, **options):
    torch.manual_seed(0)
    return gs.attention.DRSformer(channels, heads, **options).eval()


def test_each_map_keeps_its_share_rounded_down_and_rows_sum_to_the_weights():
    found = layer(24, 2)
    assert found.counts == (6, 8, 9, 9)
    assert [kept(2 / 3, n) for n in (3, 6, 7, 48)] == [2, 4, 4, 32]
    query, key, _ = found.parts(torch.randn(2, 24, 7, 5))
    whole = found.map(query, key)
    torch.testing.assert_close(whole.sum(-1), torch.full((2, 2, 12), 0.8))
    assert ((whole > 0).sum(-1) == 9).all(), "the largest share decides what is 0"
    single = layer(24, 2, shares=(1 / 2,))
    assert ((single.map(query, key) > 0).sum(-1) == 6).all()


def test_the_map_is_of_channels_whatever_the_size_of_the_image():
    found = layer()
    for side in (4, 9):
        query, key, _ = found.parts(torch.randn(1, 24, side, side))
        assert found.map(query, key).shape == (1, 2, 12, 12)


def test_weights_of_shares_are_free_and_begin_at_a_fifth():
    found = layer()
    assert found.weights.tolist() == pytest.approx([0.2] * 4)
    x = torch.randn(1, 24, 6, 6)
    before = found(x)
    with torch.no_grad():
        found.weights.mul_(-2.0)
    torch.testing.assert_close(found(x), -2 * before)


def test_one_full_share_of_weight_one_is_channel_attention():
    found = layer(24, 3, shares=(1.0,))
    with torch.no_grad():
        found.weights.fill_(1.0)
        found.temperature.copy_(torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1))
    x = torch.randn(2, 24, 5, 4)
    query, key, value = found.parts(x)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    wanted = F.scaled_dot_product_attention(query * found.temperature, key, value, scale=1.0)
    torch.testing.assert_close(found(x), found.project(wanted.reshape(x.shape)))


def test_equal_channels_tie_and_the_first_are_kept():
    found = layer(8, 1, shares=(1 / 2,))
    same = torch.ones(1, 1, 8, 10)
    assert torch.equal(found.map(same, same)[0, 0, 3] > 0, torch.arange(8) < 4)


def test_the_feed_forward_exchanges_its_branches_once():
    torch.manual_seed(0)
    net = MixedScaleFeedForward(6)
    assert net.expand.out_channels == 2 * int(6 * 2.66) and SHARES[0] == 1 / 2
    x = torch.zeros(1, 6, 9, 9)
    x[0, :, 4, 4] = 1.0
    assert net(x).shape == x.shape
    reached = net(x)[0].abs().sum(0) > 0
    assert reached[:, 4].nonzero().flatten().tolist() == list(range(9)), "5x5 upon 5x5"
    with torch.no_grad():
        net.second[1].weight[:, 0].zero_()  # of each pair of inputs, that of one branch
    assert not torch.equal(net(x), x)
