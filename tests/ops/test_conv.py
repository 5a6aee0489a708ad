"""The convolutions against torch in float64, on every set of instructions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops import conv as ops
from gossamer.ops.conv import Depthwise, Epilogue, Stage, Window, reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 4, 4), (3, 7, 7), (1, 13, 17), (0, 4, 4), (2, 1, 129), (1, 40, 48)]  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", request.param)
    return request.param


def sparse(rows, cols, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    matrix[torch.rand(rows, cols, generator=generator) > density] = 0
    return matrix


def as_weight(matrix, kernel):
    return matrix.reshape(matrix.shape[0], *kernel, -1).permute(0, 3, 1, 2)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([0, 1, 3, 4, 130]),
    st.sampled_from([0, 1, 60, 300]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_form_holds_the_matrix(rows, cols, density, tiled, seed):
    matrix = sparse(rows, cols, density, seed)
    form = ops.build(matrix, tiled)
    assert torch.equal(reference.to_matrix(form), matrix)
    assert form.values.numel() == int((matrix != 0).sum()) and form.nbytes >= 0


def test_groups_of_four_outputs_come_in_tiles_and_lonely_weights_do_not():
    lonely, shared = sparse(64, 200, 0.05), sparse(16, 200, 0.3).repeat_interleave(4, dim=0)
    assert not ops.build(lonely).tiled and ops.build(shared).tiled
    assert ops.sharing(shared) == 4.0
    counts = ops.build(shared).counts.reshape(-1, 16)
    assert not counts[:, :15].any() and ops.build(shared).columns.numel() == counts[:, 15].sum()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (33, 130), (200, 257)], ids=str)
def test_1x1_products_equal_float64(isa, shape, tiled):
    matrix = sparse(*shape)
    matrix[shape[0] // 2] = 0
    matrix[:, shape[1] // 3] = 0
    form, bias = ops.build(matrix, tiled), torch.randn(shape[0])
    for images, height, width in SHAPES:
        x = torch.randn(images, shape[1], height, width)
        exact = torch.einsum("oi,nihw->nohw", matrix.double(), x.double())
        torch.testing.assert_close(ops.conv(x, form).double(), exact, rtol=1e-5, atol=1e-4)
        turned = x.contiguous(memory_format=torch.channels_last)
        found = ops.conv(turned, form, epilogue=Epilogue(bias, 0.0, 6.0))
        exact = (exact + bias.double().reshape(-1, 1, 1)).clamp(0, 6)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
        assert found.is_contiguous()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        Window((3, 3), (1, 1), (1, 1)),
        Window((3, 3), (2, 2), (1, 1)),
        Window((5, 3), (3, 2), (0, 2)),
        Window((2, 4), (1, 1), (1, 0)),
        Window((1, 1), (2, 2)),
        Window((1, 7), (1, 2), (0, 3)),
    ],
    ids=str,
)
def test_larger_kernels_equal_float64(isa, window, tiled):
    channels, taps = 7, window.kernel[0] * window.kernel[1]
    matrix, bias = sparse(21, taps * channels, 0.4), torch.randn(21)
    form, weight = ops.build(matrix, tiled), as_weight(matrix, window.kernel).double()
    for images, height, width in SHAPES:
        x = torch.randn(images, channels, height, width)
        if min(window.outputs(height, width)) < 1:
            with pytest.raises(UsageError, match="smaller than the kernel"):
                ops.conv(x, form, window)
            continue
        exact = functional.conv2d(x.double(), weight, bias.double(), window.stride, window.padding)
        found = ops.conv(x, form, window, Epilogue(bias, -math.inf, 1.0))
        torch.testing.assert_close(found.double(), exact.clamp(max=1.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_alone_and_before_a_1x1_equal_float64(isa, stride):
    for images, channels, height, width in [(1, 1, 1, 1), (2, 3, 5, 4), (1, 7, 16, 17),
                                            (1, 2, 33, 31), (0, 2, 4, 4), (1, 40, 40, 48)]:  # fmt: skip
        x, weight = torch.randn(images, channels, height, width), torch.randn(channels, 1, 3, 3)
        matrix = sparse(9, channels, 0.5)
        for bias in (None, torch.randn(channels)):
            wide = None if bias is None else bias.double()
            exact = functional.conv2d(x.double(), weight.double(), wide, stride, 1, 1, channels)
            exact = exact.clamp(0.0, 6.0)
            prologue = Depthwise(weight, stride, Epilogue(bias, 0.0, 6.0))
            found = ops.depthwise(x.contiguous(memory_format=torch.channels_last), prologue)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
            found = ops.conv(x, ops.build(matrix), prologue=prologue)
            exact = torch.einsum("oi,nihw->nohw", matrix.double(), exact)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tiled", [False, True])
def test_dropped_channels_never_touch_an_output_and_kept_ones_do(isa, tiled):
    matrix, x = sparse(20, 140), torch.randn(1, 140, 5, 5)
    x[0, 3, 1, 1], x[0, 130, 4, 4] = float("nan"), float("inf")
    found = ops.conv(x, ops.build(matrix, tiled), epilogue=Epilogue(None, 0.0, math.inf))
    assert torch.equal(torch.isnan(found[0, :, 1, 1]), matrix[:, 3] != 0)
    assert torch.equal(torch.isinf(found[0, :, 4, 4]), matrix[:, 130] > 0)
    assert torch.isfinite(found[0, :, 0, 0]).all()
    only = torch.zeros(4, 9)  # of a 3x3 kernel, one tap each
    only[torch.arange(4), torch.tensor([0, 4, 8, 2])] = 1.0
    plane = torch.zeros(1, 1, 6, 6)
    plane[0, 0, 2, 3] = float("nan")
    found = ops.conv(plane, ops.build(only, tiled), Window((3, 3), (1, 1), (1, 1)))
    assert torch.isnan(found).flatten(2).sum(dim=2).tolist() == [[1, 1, 1, 1]]


def test_threads_do_not_change_the_result(isa, over_threads):
    form, x = ops.build(sparse(300, 200)), torch.randn(2, 200, 9, 9)
    three, taps = ops.build(sparse(40, 1800)), Window((3, 3), (2, 2), (1, 1))
    prologue = Depthwise(torch.randn(200, 1, 3, 3), 2, ops.NO_EPILOGUE)
    for call in (
        lambda: ops.conv(x, form),
        lambda: ops.conv(x, three, taps),
        lambda: ops.conv(x, form, prologue=prologue),
        lambda: ops.depthwise(x, prologue),
    ):
        one, *others = over_threads(call, (1, 2, 3, 11))
        assert all(torch.equal(one, other) for other in others)


def test_a_chain_equals_its_stages_and_keeps_no_result(isa):
    prologue = Depthwise(torch.randn(16, 1, 3, 3), 2, Epilogue(torch.randn(16), 0.0, 6.0))
    stages = [
        Stage(ops.build(sparse(16, 27)), Window((3, 3), (1, 1), (1, 1)), ops.NO_EPILOGUE, None),
        Stage(None, Window(), ops.NO_EPILOGUE, prologue),
        Stage(ops.build(sparse(16, 16)), Window(), Epilogue(None, 0.0, 1.0), prologue),
    ]
    run = ops.chain(stages)
    for shape in [(1, 3, 12, 10), (2, 3, 9, 9), (1, 3, 12, 10), (0, 3, 8, 8)]:
        x = torch.randn(shape)
        exact = ops.conv(x, stages[0].form, stages[0].window)
        exact = ops.depthwise(exact, prologue)
        exact = ops.conv(exact, stages[2].form, epilogue=stages[2].epilogue, prologue=prologue)
        found = run(x)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        kept = found.clone()
        run(torch.randn(shape))
        assert torch.equal(found, kept)
    with pytest.raises(UsageError, match="3 channels"):
        run(torch.randn(1, 4, 9, 9))


def test_opcheck_and_bad_input():
    form, x = ops.build(sparse(12, 9)), torch.randn(2, 9, 3, 4)
    parts = [form.values, form.columns, form.counts, form.rows]
    deep, clamps = torch.randn(9, 1, 3, 3), [0.0, 6.0, 0.0, 1.0]
    facts = [12, 9, int(form.tiled)]
    bias = torch.randn(12)
    one = [1, 1, 1, 1, 0, 0]
    torch.library.opcheck(ops._sparse_conv, (x, parts, facts, one, bias, None, None, 1, clamps))
    torch.library.opcheck(ops._sparse_conv, (x, parts, facts, one, bias, deep, None, 2, clamps))
    torch.library.opcheck(ops._depthwise_conv, (x, deep, torch.randn(9), 2, 0.0, 6.0))
    for call, words in [
        (lambda: ops.conv(torch.randn(2, 8, 3, 4), form), "9 channels"),
        (lambda: ops.conv(x[0], form), "9 channels"),
        (lambda: ops.conv(x.double(), form), "float64"),
        (lambda: ops.conv(x, form, epilogue=Epilogue(torch.randn(11), 0.0, 1.0)), "bias"),
        (lambda: ops.conv(x, form, epilogue=Epilogue(None, 1.0, 0.0)), "at most high"),
        (lambda: ops.conv(x, form, Window((2, 2))), "do not fit"),
        (lambda: ops.conv(x, form, Window((1, 1), (1, 3))), "stride"),
        (
            lambda: ops.conv(x, form, prologue=Depthwise(deep[:8], 1, ops.NO_EPILOGUE)),
            "same channels",
        ),
        (
            lambda: ops.depthwise(x, Depthwise(torch.randn(9, 1, 5, 5), 1, ops.NO_EPILOGUE)),
            "stride 1 or 2",
        ),
        (lambda: ops.depthwise(x, Depthwise(deep, 3, ops.NO_EPILOGUE)), "stride 1 or 2"),
        (lambda: ops.depthwise(x, Depthwise(deep.double(), 1, ops.NO_EPILOGUE)), "float64"),
        (lambda: ops.build(torch.zeros(3)), "matrix"),
        (lambda: ops.build(torch.zeros(1, 1 << 17)), "65536"),
    ]:
        with pytest.raises(UsageError, match=words):
            call()
