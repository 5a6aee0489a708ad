"""The depthwise convolution against torch's, on every set of instructions."""

import pytest
import torch
from torch.nn import functional

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops import depthwise as ops

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_float64(isa, stride, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for images, channels, height, width in [(1, 1, 1, 1), (2, 3, 5, 4), (1, 7, 16, 17),
                                            (1, 2, 33, 31), (0, 2, 4, 4), (1, 40, 40, 48)]:  # fmt: skip
        x = torch.randn(images, channels, height, width)
        weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
        for b in (None, bias):
            exact = functional.conv2d(
                x.double(), weight.double(), None if b is None else b.double(), stride, 1,
                groups=channels,
            )  # fmt: skip
            found = ops.conv(x.contiguous(memory_format=torch.channels_last), weight, b, stride)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
            assert found.is_contiguous()


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_threads_and_odd_values(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    x, weight = torch.randn(1, 40, 30, 33), torch.randn(40, 1, 3, 3)
    x[0, 3, 4, 5] = float("nan")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.conv(x, weight, stride=2))
    finally:
        torch.set_num_threads(before)
    exact = functional.conv2d(x, weight, None, 2, 1, groups=40)
    assert all(torch.equal(torch.isnan(r), torch.isnan(exact)) for r in results)
    assert all(torch.equal(r.nan_to_num(), results[0].nan_to_num()) for r in results)


def test_opcheck_and_bad_input():
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3, 3)
    torch.library.opcheck(ops._depthwise_conv, (x, weight, torch.randn(4), 2))
    for call, words in [
        (lambda: ops.conv(x, torch.randn(4, 1, 5, 5)), "stride 1 or 2"),
        (lambda: ops.conv(x, weight, stride=3), "stride 1 or 2"),
        (lambda: ops.conv(x[:, :3], weight), "4 channels"),
        (lambda: ops.conv(x, weight, torch.randn(3)), "bias"),
        (lambda: ops.conv(x.double(), weight), "float64"),
    ]:
        with pytest.raises(UsageError, match=words):
            call()
