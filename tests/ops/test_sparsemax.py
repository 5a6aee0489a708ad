"""Sparsemax: the projection itself, its gradient, and rows that are hard."""

import pytest
import torch
from dense_layers import simplex

import gossamer as gs
from gossamer.ops.sparsemax import sparsemax


def rows(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_it_is_the_nearest_point_of_the_simplex(length, scale):
    logits = rows(5, length, scale=scale)
    found = sparsemax(logits)
    torch.testing.assert_close(found, simplex(logits), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=torch.float64))
    others = rows(2000, length, seed=1, scale=3.0).softmax(-1)
    distance = (others.unsqueeze(1) - logits).square().sum(-1)
    assert ((found - logits).square().sum(-1) <= distance + 1e-9).all()


def test_the_gradient_is_the_incoming_one_less_its_mean_on_the_support():
    logits = rows(6, 9).requires_grad_()
    found, incoming = sparsemax(logits), rows(6, 9, seed=1)
    (grad,) = torch.autograd.grad(found, logits, incoming)
    support = found > 0
    assert 1 < support.sum() < support.numel()
    for row in range(6):
        there = support[row]
        expected = incoming[row, there] - incoming[row, there].mean()
        torch.testing.assert_close(grad[row, there], expected)
        assert not grad[row, ~there].any()


def test_gradcheck_once_and_twice():
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(2)) < 0.8
    logits = rows(4, 7).requires_grad_()
    for call in (sparsemax, lambda x: sparsemax(x, mask=mask), lambda x: sparsemax(x, dim=0)):
        assert torch.autograd.gradcheck(call, (logits,))
        assert torch.autograd.gradgradcheck(call, (logits,))


def test_padding_has_no_weight_whatever_it_holds():
    logits = rows(3, 8)
    mask = torch.arange(8) < torch.tensor([[8], [5], [0]])
    poisoned = logits.masked_fill(~mask, torch.nan)
    poisoned[1, 6] = torch.inf
    found = sparsemax(poisoned, mask=mask)
    torch.testing.assert_close(found[0], sparsemax(logits[0]))
    torch.testing.assert_close(found[1, :5], sparsemax(logits[1, :5]))
    assert not found[~mask].any() and not found[2].any()
    same = logits.masked_fill(~mask, -torch.inf).requires_grad_()
    torch.testing.assert_close(sparsemax(same), found)
    sparsemax(same).square().sum().backward()
    assert same.grad.isfinite().all()


def test_shifts_do_not_matter_and_ties_share():
    logits = rows(4, 6, dtype=torch.float32)
    torch.testing.assert_close(sparsemax(logits + 1000), sparsemax(logits), rtol=0, atol=1e-4)
    assert sparsemax(torch.zeros(4)).tolist() == [0.25] * 4
    assert sparsemax(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.0]
    assert sparsemax(torch.tensor([2.5, 2.0])).tolist() == [0.75, 0.25]


def test_nan_and_infinity_show_in_their_row():
    logits = rows(3, 4)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    found = sparsemax(logits)
    assert found[:2].isnan().all() and found[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_summed_in_float32(dtype):
    logits = rows(8, 200, dtype=dtype)
    found = sparsemax(logits)
    assert found.dtype == dtype
    assert torch.equal(found, sparsemax(logits.float()).to(dtype))


def test_axes_vmap_and_empty_rows():
    logits = rows(3, 4, 5)
    torch.testing.assert_close(sparsemax(logits, dim=1), sparsemax(logits.mT).mT)
    torch.testing.assert_close(torch.func.vmap(sparsemax)(logits), sparsemax(logits))
    assert sparsemax(torch.zeros(3, 0)).shape == (3, 0)


def test_what_is_no_fit_is_refused():
    for bad in (
        lambda: sparsemax(torch.zeros(3, dtype=torch.int64)),
        lambda: sparsemax(torch.zeros(3), dim=1),
        lambda: sparsemax(torch.zeros(()), dim=0),
        lambda: sparsemax(torch.zeros(3), mask=torch.ones(3)),
        lambda: sparsemax(torch.zeros(3), mask=torch.ones(4, dtype=torch.bool)),
    ):
        with pytest.raises(gs.UsageError):
            bad()
