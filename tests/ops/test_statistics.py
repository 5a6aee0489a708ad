"""Compensated sums stay exact where plain ones drift."""

import pytest
import torch

from gossamer.core.errors import UsageError
from gossamer.core.stats import Hessian
from gossamer.ops import _dispatch
from gossamer.ops import statistics as ops
from gossamer.ops.statistics import reference

if _dispatch.kernels() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)


@pytest.mark.parametrize("isa", ["native", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (700, 33), (1500, 600), (0, 20)])
def test_gram_sums_are_exact_to_float32(isa, shape, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", "reference")
    x = torch.randn(shape) + 3  # all products positive: plain sums drift most
    hessian = Hessian(add=ops.add_gram)
    state = hessian.init(shape[1])
    for rows in x.split(300):
        state = hessian.update(state, rows)
    found = hessian.finalize(state, "x").hessian
    exact = 2 / max(1, shape[0]) * x.double().t() @ x.double()
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_compensated_sums_keep_what_plain_ones_lose():
    """A million small products on top of a large one."""
    x = torch.full((4096, 4), 1e-2)
    total, rest = torch.full((4, 4), 1e6), torch.zeros(4, 4)
    plain = total.clone()
    for _ in range(100):
        ops.add_gram(total, rest, x)
        plain.addmm_(x.t(), x)
    added = 100 * 4096 * x.double()[0, 0] ** 2
    ours = (total.double() + rest.double())[0, 0]
    bound = 2.0**-16 * added  # 256 rows in any order of summation
    assert abs(ours - 1e6 - added) < bound < 1e-2 * abs(plain.double()[0, 0] - 1e6 - added)


@pytest.mark.parametrize("columns", [1, 4, 33, 600])
def test_products_are_short_enough_for_any_order_of_summation(columns):
    """256 products of numbers up to 255 are exact in float32 however they are summed."""
    x = 2 * torch.randint(120, 128, (4000, columns)).float() + 1
    total, rest = torch.zeros(columns, columns), torch.zeros(columns, columns)
    ops.add_gram(total, rest, x)
    exact = x.double().t() @ x.double()
    assert torch.equal((total.double() + rest.double()).triu(), exact.triu())


def test_kernel_and_reference_add_alike():
    total, rest, product = torch.randn(3, 40, 40).unbind()
    expected = total.clone(), rest.clone()
    reference.compensated_add(*expected, product)
    ops._add(total, rest, product)
    assert torch.equal(total, expected[0]) and torch.equal(rest, expected[1])


def test_states_merge():
    x = torch.randn(400, 20) + 1
    hessian, plain = Hessian(add=ops.add_gram), Hessian()
    parts = [hessian.update(hessian.init(20), rows) for rows in x.split(150)]
    whole = hessian.merge(hessian.merge(parts[0], parts[1]), parts[2])
    expected = hessian.finalize(hessian.update(hessian.init(20), x), "x").hessian
    torch.testing.assert_close(hessian.finalize(whole, "x").hessian, expected)
    assert whole.count == 400
    with pytest.raises(UsageError, match="cannot merge"):
        hessian.merge(plain.update(plain.init(20), x), whole)


def test_bad_input():
    total = torch.zeros(4, 4)
    for parts in (
        (total, total, torch.zeros(3, 5)),
        (total, total, torch.zeros(3, 4).double()),
        (total, torch.zeros(4, 5), torch.zeros(3, 4)),
        (total, torch.zeros(8, 4)[::2], torch.zeros(3, 4)),
    ):
        with pytest.raises(UsageError, match="Gram"):
            ops.add_gram(*parts)
