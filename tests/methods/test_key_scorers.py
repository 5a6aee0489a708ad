"""Every method that chooses pairs of queries and keys keeps what the role promises."""

import pytest
import torch
from examples import ATTENTION, BY_HEADS_OF_KEYS, GENEROUS, WITHOUT_SINKS
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.engine.inputs.attend import run_layout
from gossamer.engine.inputs.counting import pairs, possible_pairs

NAMES = sorted(ATTENTION)


def made(length, batch=1, heads=4, kv_heads=2, past=0, width=16, seed=0, dtype=torch.float32):
    """Queries, keys and values with structure: some keys are wanted by all queries."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = normal(batch, heads, length, width), normal(batch, kv_heads, length + past, width)
    value = normal(batch, kv_heads, length + past, width)
    wanted = torch.rand(length + past, generator=generator) < 0.05
    key[:, :, wanted] += 2
    return (query + 0.5).to(dtype), key.to(dtype), value.to(dtype)


def call_of(query, key, value, causal=True):
    return AttentionCall(query, key, value, query.shape[-1] ** -0.5, causal)


def mask_of(layout, call):
    """bool (batch, heads, queries, keys): what the executor really attends."""
    batch = call.query.shape[0]
    eye = torch.eye(call.keys).expand(batch, call.key.shape[1], -1, -1)
    flat = call_of(torch.zeros_like(call.query), torch.zeros_like(call.key), eye, call.causal)
    return run_layout(flat, layout)[0] > 0


def dense(query, key, value):
    past = key.shape[2] - query.shape[2]
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(past)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_any_length_is_served_and_counted(name, length):
    call = call_of(*made(length))
    layout = ATTENTION[name]().layout(call)
    mask = mask_of(layout, call)
    assert mask.any(-1).all() and not mask.triu(1).any()
    assert pairs(layout, call) == int(mask.sum())
    assert pairs(layout, call) / possible_pairs(call) == pytest.approx(layout.density(True))
    assert (length < 100) or mask.sum() < possible_pairs(call)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("past", [5, 48, 90])
def test_a_later_part_of_a_prompt_sees_what_came_before(name, past):
    call = call_of(*made(37, past=past))
    layout = ATTENTION[name]().layout(call)
    mask = mask_of(layout, call)
    assert mask.any(-1).all() and not mask.triu(past + 1).any()
    assert pairs(layout, call) == int(mask.sum())


@pytest.mark.parametrize("name", sorted(GENEROUS))
@pytest.mark.parametrize(("length", "past"), [(1, 0), (130, 0), (1, 77), (50, 77)])
def test_a_budget_above_the_length_is_dense(name, length, past):
    tensors = made(length, batch=2, past=past)
    found = gs.attend(*tensors, GENEROUS[name](), causal=True)
    torch.testing.assert_close(found, dense(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_choices_repeat_and_leave_their_inputs(name):
    tensors = made(100)
    before = [x.clone() for x in tensors]
    found = [gs.attend(*tensors, ATTENTION[name](), causal=True) for _ in range(2)]
    assert torch.equal(*found)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_are_never_attended(name):
    query, key, value = made(100)
    layout = ATTENTION[name]().layout(call_of(query, key, value))
    first = run_layout(call_of(query, key, value), layout)[0]
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 60:] = 7.0
    again = run_layout(call_of(*changed), layout)[0]
    assert torch.equal(first[:, :, :60], again[:, :, :60])
    assert not torch.equal(first[:, :, 60:], again[:, :, 60:])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(BY_HEADS_OF_KEYS)])
def test_shared_keys_are_the_same_as_repeated_ones(name):
    query, key, value = made(100)
    repeated = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    shared = gs.attend(query, key, value, ATTENTION[name](), causal=True)
    found = gs.attend(query, *repeated, ATTENTION[name](), causal=True)
    torch.testing.assert_close(found, shared, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_batch_of_unequal_prompts_is_each_alone(name, side):
    query, key, value = made(100, batch=3)
    real = torch.zeros(3, 100, dtype=torch.bool)
    for text, length in enumerate((100, 61, 16)):
        real[text, :length] = True
    if side == "left":
        real = real.flip(1)
    if side == "holes":
        real = torch.rand(3, 100, generator=torch.Generator().manual_seed(1)) < 0.7
    for x in (query, key, value):
        x.masked_fill_(~real[:, None, :, None], float("nan"))  # padding is never looked at
    together = gs.attend(query, key, value, ATTENTION[name](), causal=True, padding=real)
    assert not together[~real[:, None].expand(-1, 4, -1)].any()
    for text in range(3):
        alone = [x[text : text + 1][:, :, real[text]] for x in (query, key, value)]
        found = gs.attend(*alone, ATTENTION[name](), causal=True)
        torch.testing.assert_close(together[text : text + 1][:, :, real[text]], found)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(WITHOUT_SINKS)])
def test_equal_scores_keep_the_first_key_and_the_own(name):
    call = call_of(*(torch.zeros(1, 4, 100, 16) for _ in range(3)))
    mask = mask_of(ATTENTION[name]().layout(call), call)
    assert mask[..., 0].all() and mask.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_chosen_pairs(name):
    tensors = [x.requires_grad_() for x in made(50)]
    mask = mask_of(ATTENTION[name]().layout(call_of(*tensors)), call_of(*made(50)))
    found = gs.attend(*tensors, ATTENTION[name](), causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=mask, enable_gqa=True
    )
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        torch.autograd.grad(found, tensors, grad),
        torch.autograd.grad(wanted, tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(name):
    tensors = made(100, dtype=torch.bfloat16)
    found = gs.attend(*tensors, ATTENTION[name](), causal=True)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    call = call_of(*tensors)
    exact = run_layout(call_of(*(x.float() for x in tensors)), ATTENTION[name]().layout(call))
    torch.testing.assert_close(found.float(), exact[0], rtol=0.03, atol=0.03)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_size_queries_times_keys_is_made(name):
    call = call_of(*made(1024))
    with Largest() as largest:
        ATTENTION[name]().layout(call)
    assert 0 < largest.most <= 1024 * 1024 / 4


@pytest.mark.parametrize("asked", [0.1, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("block", [8, 16, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_the_measured_density_is_at_most_what_was_asked(asked, block, causal):
    method = gs.attention.BlockSparse(block=block, density=asked)
    call = call_of(*made(1000, seed=block), causal=causal)
    measured = pairs(method.layout(call), call) / possible_pairs(call)
    least = gs.attention.BlockSparse(blocks=1, block=block)  # only what is always kept
    bound = pairs(least.layout(call), call) / possible_pairs(call)
    assert measured <= max(asked, bound)
    assert measured > asked - 2 * block / 1000 - 0.05


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_fit_is_refused(name):
    query, key, value = made(20)
    method = ATTENTION[name]()
    for bad in (
        lambda: gs.attend(query[0], key, value, method, causal=True),
        lambda: gs.attend(query, key[:, :, :10], value[:, :, :10], method, causal=True),
        lambda: gs.attend(query[:, :3], key, value, method, causal=True),
        lambda: gs.attend(query, key, value, type(method), causal=True),
        lambda: gs.attend(query, key, value, method, causal=True, padding=torch.ones(1, 20)),
        lambda: gs.attend(query, key, value, "wanda", causal=True),
        lambda: gs.attend(query, key, value, gs.weights.Wanda(), causal=True),
    ):
        with pytest.raises(gs.UsageError):
            bad()
    if method.card.name != "blocksparse":
        with pytest.raises(gs.UsageError, match="both sides"):
            gs.attend(query, key, value, method, causal=False)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: gs.attention.BlockSparse(blocks=0),
        lambda: gs.attention.BlockSparse(blocks=3, density=0.5),
        lambda: gs.attention.BlockSparse(density=0),
        lambda: gs.attention.VerticalSlash(verticals=0.5),
        lambda: gs.attention.VerticalSlash(sinks=-1),
        lambda: gs.attention.FlexPrefill(share=1.5),
        lambda: gs.attention.FlexPrefill(block=True),
        lambda: gs.attention.StreamingLLM(window=0),
        lambda: gs.attention.AnchorAttention(theta=float("nan")),
        lambda: gs.attention.AnchorAttention(step=0),
    ],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        bad()
