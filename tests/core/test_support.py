"""Zeroing outside a mask: the same bits as masked_fill, whatever lies there and however it lies."""

import pytest
import torch

from gossamer.core.support import zero_outside


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32]
)
@pytest.mark.parametrize("layout", ["plain", "transposed", "channels last", "strided"])
def test_it_is_masked_fill_bit_for_bit(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, 8, 8, generator=generator) * 100
    if dtype.is_floating_point:
        values[0, 0, 0] = torch.nan
        values[1, 0, 0], values[2, 0, 0] = torch.inf, -torch.inf
    mask = torch.rand(values.shape, generator=generator) < 0.4
    values = values.to(dtype)
    arrange = {
        "plain": lambda x: x,
        "transposed": lambda x: x.reshape(24, 64).t(),
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "strided": lambda x: x[:, ::2],
    }[layout]
    tensor, mask = arrange(values.clone()), arrange(mask)
    want = tensor.clone().masked_fill_(~mask, 0)
    kept = tensor[mask].clone()
    assert zero_outside(tensor, mask) is tensor

    def bits(x):
        return x.contiguous().view(torch.uint8)

    assert torch.equal(bits(tensor), bits(want))
    assert torch.equal(bits(tensor[mask]), bits(kept)) and 0 < kept.numel() < tensor.numel()


def test_other_kinds_of_tensors_are_filled():
    class Kind(torch.Tensor):
        pass

    tensor = torch.ones(5).as_subclass(Kind)
    zero_outside(tensor, torch.arange(5) > 1)
    assert tensor.tolist() == [0, 0, 1, 1, 1] and type(tensor) is Kind
