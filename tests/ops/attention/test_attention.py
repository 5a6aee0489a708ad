"""Attention over chosen pairs against dense masked attention in float64."""

import pytest
import torch
from dense_attention import dense
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops import attention as ops
from gossamer.ops.attention import Layout, attention, merge

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [*(name for index, name in enumerate(_dispatch.ISAS) if index <= best), "reference"]
SEEDS = st.integers(0, 10**6)


def same(found, exact, rtol=1e-5, atol=2e-5):
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def check(seed, dtype=torch.float32, **tolerance):
    *inputs, options = problem(seed, dtype)
    found = attention(*inputs, **options)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert not found[0].isnan().any()
    same(found, dense(*inputs, **options), **tolerance)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_every_layout_equals_dense_masked_attention(isa, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        check(seed)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_bfloat16_differs_by_its_own_rounding(isa, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        check(seed, torch.bfloat16, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_a_thousand_random_layouts(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for seed in range(1000):
        check(seed)


def leaves(inputs, options):
    """The tensors that want gradients, and the call with them."""
    query, key, value, layout = inputs
    names = [n for n in ("block_bias", "key_bias") if options.get(n) is not None]
    start = options.get("start")
    parts = [query, key, value, *(options[n] for n in names), *(start or ())]
    parts = [part.detach().clone().requires_grad_() for part in parts]

    def run(function):
        more = dict(options)
        more.update(zip(names, parts[3:], strict=False))
        if start is not None:
            more["start"] = tuple(parts[-2:])
        return function(*parts[:3], layout, **more)

    return parts, run


def gradients(function, inputs, options, seed):
    parts, run = leaves(inputs, options)
    output, lse = run(function)
    generator = torch.Generator().manual_seed(seed)
    some = lse != -torch.inf  # the log-sum-exp of nothing has no gradient
    total = (output.double() * torch.randn(output.shape, generator=generator)).sum()
    total = total + (lse.double()[some] * torch.randn(lse.shape, generator=generator)[some]).sum()
    if not total.requires_grad:
        return [torch.zeros_like(part) for part in parts]
    found = torch.autograd.grad(total, parts, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parts, found, strict=True)]


def check_gradients(seed, dtype, rtol, atol):
    *inputs, options = problem(seed, dtype)
    found = gradients(attention, inputs, options, seed)
    exact = gradients(dense, [x.double() for x in inputs[:3]] + inputs[3:], options, seed)
    for a, b in zip(found, exact, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_gradients_of_the_reference_are_those_of_float64_autograd(seed):
    check_gradients(seed, torch.float64, 1e-7, 1e-9)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_gradients_equal_float64_autograd(isa, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        check_gradients(seed, torch.float32, 2e-4, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_of_many_random_layouts(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for seed in range(300):
        check_gradients(seed, torch.float32, 3e-4, 3e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_in_bfloat16(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for seed in range(12):
        *inputs, options = problem(seed, torch.bfloat16)
        options.pop("start", None)
        found = gradients(attention, inputs, options, seed)
        exact = gradients(dense, [x.double() for x in inputs[:3]] + inputs[3:], options, seed)
        for a, b in zip(found, exact, strict=True):
            assert float((a.double() - b).norm()) <= 2e-2 * float(b.norm()) + 1e-2


def parts_of(layout, columns):
    """The same layout with only some of its key blocks, and with the others."""
    mask = torch.zeros(1, 1, layout.query_blocks, layout.key_blocks, dtype=torch.bool)
    for row in range(layout.query_blocks):
        begin, end = layout.offsets[0, 0, row : row + 2].tolist()
        mask[0, 0, row, layout.blocks[begin:end].long()] = True
    sizes = (layout.queries, layout.keys, layout.rows, layout.columns)
    return Layout.from_blocks(mask & columns, *sizes), Layout.from_blocks(mask & ~columns, *sizes)


@pytest.mark.parametrize("isa", ISAS)
def test_disjoint_parts_merge_to_the_whole(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 2, 100, 24),
        torch.randn(2, 1, 90, 24),
        torch.randn(2, 1, 90, 8),
    )
    whole = Layout.from_blocks(torch.rand(7, 6) < 0.6, 100, 90, 16, 16)
    one, two = parts_of(whole, torch.tensor([True, False, True, False, False, True]))
    first, second = attention(query, key, value, one), attention(query, key, value, two)
    expected = dense(query, key, value, whole)
    same(merge(first, second), expected)
    same(merge(second, first), expected)
    same(attention(query, key, value, two, start=first), expected)


def test_merging_is_differentiable_and_never_reads_empty_parts():
    torch.manual_seed(0)
    parts = [torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sums = [torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    call = lambda a, b, c, d: merge((a, b), (c, d))  # noqa: E731
    assert torch.autograd.gradcheck(call, (parts[0], sums[0], parts[1], sums[1]))
    lse = torch.tensor([[[-torch.inf, 0.0, -torch.inf]]])
    empty = torch.full((1, 1, 3, 2), torch.nan)
    empty[0, 0, 1] = 1.0
    other = torch.tensor([[[1.0, -torch.inf, -torch.inf]]], requires_grad=True)
    output = torch.tensor([[[2.0, 2.0], [torch.nan, 3.0], [0.0, torch.nan]]], requires_grad=True)
    found, total = merge((empty, lse), (output[None], other))
    assert found.tolist() == [[[[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]]]
    assert total.tolist() == [[[1.0, 0.0, -torch.inf]]]
    (found.sum() + total[0, 0, :2].sum()).backward()
    assert output.grad.tolist() == [[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]
    assert other.grad.tolist() == [[[1.0, 0.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_attended_does_not_matter(isa, dtype, monkeypatch):
    """Keys outside the lists, past the diagonal and left out by a bias hold NaN, as does memory
    beyond a slice of a cache; so do queries without keys."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    query = torch.randn(1, 2, 70, 20)
    cache = torch.full((2, 1, 2, 200, 20), torch.nan)
    used = torch.rand(90) < 0.5
    used[:16], used[64:] = False, False  # a whole tile, and all beyond the queries' positions
    used[40] = False
    cache[:, 0, :, :90][:, :, used] = torch.randn(2, 2, int(used.sum()), 20)
    mask = (torch.rand(70, 90) < 0.7) & used
    mask[:, 40], mask[7], mask[:, 70:] = True, False, True
    query[:, :, 7] = torch.nan
    bias = torch.zeros(1, 1, 90)
    bias[..., 40] = -torch.inf
    layout = Layout.from_mask(mask, 64, 16)
    query, cache = query.to(dtype).requires_grad_(), cache.to(dtype).requires_grad_()
    key, value = cache[0, :, :, :90], cache[1, :, :, :90]
    options = {"causal": True, "query_positions": torch.arange(70) - 6, "key_bias": bias}
    output, lse = attention(query, key, value, layout, **options)
    assert not output.isnan().any() and torch.equal(
        output[:, :, 7], torch.zeros_like(output[:, :, 7])
    )
    filled = [torch.nan_to_num(x.detach()) for x in (query, key, value)]
    bits = 1e-5 if dtype == torch.float32 else 2e-2
    same((output, lse), dense(*filled, layout, **options), bits, bits)
    output.float().sum().backward()
    seen = mask.any(0) & (bias[0, 0] == 0) & (torch.arange(90) < 64)
    assert not query.grad.isnan().any() and not cache.grad.isnan().any()
    assert not cache.grad[:, 0, :, :90][:, :, ~seen].any()


@pytest.mark.parametrize("isa", ISAS)
def test_a_value_that_is_not_finite_reaches_only_who_attends_it(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 64, 16) for _ in range(3))
    value[0, 0, 20, 3], value[0, 0, 30] = torch.inf, torch.nan
    output, _ = attention(
        query, key, value, Layout.from_blocks(torch.ones(1, 1) > 0, 64, 64), causal=True
    )
    if isa == "reference":  # a dense product: 0 * inf within a block of queries
        return
    odd = torch.zeros(64, 16, dtype=torch.bool)
    odd[20:, 3], odd[30:] = True, True
    assert torch.equal(output[0, 0].isfinite(), ~odd)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 300, 32) for heads in (4, 2, 2)]
    layout = Layout.from_blocks(torch.rand(1, 4, 5, 5) < 0.5, 300, 300)

    def run():
        parts = [x.clone().requires_grad_() for x in inputs]
        found = attention(*parts, layout, causal=True)
        return *found, *torch.autograd.grad(found[0].square().sum(), parts)

    one, *others = over_threads(run)
    for other in others:
        if isa == "reference":  # torch's own products
            continue
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradcheck_with_everything():
    """Both outputs, biases and a start, in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 5, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    layout = Layout.from_blocks(torch.rand(1, 2, 3, 2) < 0.8, 5, 5, 2, 3)
    block = torch.randn(layout.blocks.numel(), dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    start = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, block, key, start, lse):
        return attention(
            q, k, v, layout, causal=True, block_bias=block, key_bias=key, start=(start, lse)
        )

    assert torch.autograd.gradcheck(run, (q, k, v, block, key, start, lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    for seed in (1, 2, 3):
        query, key, value, layout, options = problem(seed, dtype, least=3)
        options.pop("start", None)
        wanted = [x.requires_grad_() for x in (query, key, value)]
        scale = ops.check_inputs(query, key, value, None)
        pair = ops.paired_positions(query, key.shape[2], options["causal"], None, None)
        given = ops._problem(
            layout, query, options.get("block_bias"), options.get("key_bias"), pair,
            options["causal"], scale,
        )  # fmt: skip
        args = (*wanted, *ops._plain(given))
        torch.library.opcheck(ops._attention, args)
        with torch.no_grad():
            output, lse = ops._attention(*args)
        detached = [x.detach() for x in wanted]
        back = (torch.randn_like(output), torch.randn_like(lse), *detached, output, lse)
        torch.library.opcheck(ops._attention_backward, (*back, *ops._plain(given)))


def test_the_gradient_of_a_gradient_is_refused():
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    output, _ = attention(x, x, x, Layout.from_blocks(torch.ones(1, 1) > 0, 4, 4))
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_bad_input():
    q, k, v = (torch.randn(1, h, 8, 4) for h in (4, 2, 2))
    layout = Layout.from_blocks(torch.ones(1, 1) > 0, 8, 8)
    many = Layout.from_blocks(torch.ones(1, 3, 1, 1) > 0, 8, 8)
    state = (torch.randn(1, 4, 8, 4), torch.randn(1, 4, 8))
    ints = torch.arange
    for arguments, options, said in (
        ((q[:, :3], k, v, layout), {}, "3 heads are no multiple of 2"),
        ((q, k[..., :3], v, layout), {}, "queries of width 4, keys of width 3"),
        ((q, k[:, :, :7], v, layout), {}, "differ in length"),
        ((q, k, v.double(), layout), {}, "one dtype"),
        ((q.long(), k, v, layout), {}, "floating"),
        ((q[0], k, v, layout), {}, "batch, heads, length"),
        ((torch.cat([q, q]), k, v, layout), {}, "a batch of 2 queries"),
        ((q[:, :, :7], k, v, layout), {}, "a layout of 8 queries and 8 keys, but there are 7"),
        ((q, k, v, many), {}, "a layout for 3 heads"),
        ((q, k, v, layout), {"scale": float("nan")}, "scale is a finite number"),
        ((q, k, v, layout), {"scale": float("inf")}, "scale is a finite number"),
        ((q, k, v, layout), {"block_bias": torch.zeros(2)}, "the layout lists 1 tiles"),
        ((q, k, v, layout), {"key_bias": torch.zeros(8)}, "key_bias"),
        ((q, k, v, layout), {"key_bias": torch.zeros(1, 3, 8)}, "cannot be shared by 4 heads"),
        ((q, k, v, layout), {"key_bias": torch.zeros(2, 1, 8)}, "the batch is 1"),
        ((q, k, v, layout), {"query_positions": ints(7)}, "7 query_positions for a length of 8"),
        ((q, k, v, layout), {"key_positions": ints(8.0)}, "key_positions are int64"),
        ((q, k, v, layout), {"key_positions": ints(8) + 2**33}, "31 bits"),
        ((q, k, v, layout), {"start": (state[0][..., :3], state[1])}, "start is an"),
        ((q, k, v, layout), {"start": (state[0], state[1][..., :3])}, "start is an"),
        ((q, k, v, layout), {"start": (state[0], state[1].half())}, "lse of start"),
    ):
        with pytest.raises(UsageError, match=said):
            attention(*arguments, **options)


def test_kernel_name(monkeypatch):
    assert ops.kernel_name() == f"attention/{_dispatch.isa()}"
    assert ops.kernel_name(torch.zeros(1, dtype=torch.float64)) == "attention/reference"
    if best >= 0:
        dots = _dispatch.isa() == "avx512" and _dispatch.compiled().has_bf16()
        name = ops.kernel_name(torch.zeros(1, dtype=torch.bfloat16))
        assert name == f"attention/{_dispatch.isa()}{'-bf16' if dots else ''}"
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    assert ops.kernel_name(torch.zeros(1)) == "attention/reference"
