"""Every method of attention that follows denoising steps keeps what the role promises."""

from dataclasses import replace

import pytest
import torch
from examples import GENEROUS_STEPS, GRID, STEPS

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import DenoisingStep

NAMES = sorted(STEPS)
TOTAL = 10


def grid_for(name, grid=GRID):
    """Without text for a method that makes a video chunk after chunk."""
    return replace(grid, text=0) if name.startswith("lightforcing") else grid


def drifting(name, batch=1, seed=0, dtype=torch.float32, grid=GRID):
    """Queries, keys and values of each step, which change a little from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid_for(name, grid).tokens
    keys = 3 * tokens if name.startswith("lightforcing") else tokens

    def normal(count, length, scale=1.0):
        return scale * torch.randn(batch, count, length, 16, generator=generator)

    base = [normal(4, tokens), normal(2, keys), normal(2, keys)]
    return [
        tuple((x + normal(*x.shape[1:3], 0.05 * n)).to(dtype) for x in base) for n in range(TOTAL)
    ]


def outputs(run, calls, branch=""):
    found = []
    for number, (query, key, value) in enumerate(calls):
        run.step(number, branch)
        found.append(run.attend(query, key, value, layer=0))
    return found


def opened(name, method=None, **options):
    method = STEPS[name]() if method is None else method
    return gs.sparse_denoising(None, method, **{"steps": TOTAL, "grid": grid_for(name)} | options)


def sampled(name, calls, **options):
    with opened(name, **options) as run:
        found = outputs(run, calls)
    return found, run.result


def dense(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_in_a_row_are_identical(name):
    calls = drifting(name)
    with opened(name) as run:
        first = outputs(run, calls)
        second = outputs(run, calls)
    again, result = sampled(name, calls)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, again))
    assert run.result.runs == 2 and result.runs == 1
    assert run.result.calls == 2 * result.calls == 2 * TOTAL


@pytest.mark.parametrize("name", NAMES)
def test_the_run_is_sparse_and_counted(name):
    calls = drifting(name)
    found, result = sampled(name, calls, measure=True)
    assert 0 < result.sparse_density < 1 and result.sparse_density <= result.density <= 1
    assert result.dense_calls + result.chosen_calls + result.reused_calls == TOTAL
    assert result.dense_calls < TOTAL and result.layers == 1
    wanted = [dense(*call) for call in calls]
    error = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    norm = sum(float(b.square().sum()) for b in wanted)
    assert result.error == pytest.approx((error / norm) ** 0.5, rel=1e-3) and result.error > 0
    assert result.flops > 0 and result.dense_flops > 0


@pytest.mark.parametrize("name", NAMES)
def test_branches_have_states_of_their_own(name):
    one, two = drifting(name, seed=1), drifting(name, seed=2)
    with opened(name) as run:
        found = {"text": [], "none": []}
        for number, parts in enumerate(zip(one, two, strict=True)):
            for branch, (query, key, value) in zip(found, parts, strict=True):
                run.step(number, branch)
                found[branch].append(run.attend(query, key, value, layer=0))
    for branch, calls in (("text", one), ("none", two)):
        alone, _ = sampled(name, calls)
        assert all(map(torch.equal, found[branch], alone))
    assert run.result.runs == 1


@pytest.mark.parametrize("name", NAMES)
def test_elements_of_a_batch_do_not_meet(name):
    calls = drifting(name, batch=2)
    together, _ = sampled(name, calls)
    for element in range(2):
        own = [tuple(x[element : element + 1] for x in call) for call in calls]
        alone, _ = sampled(name, own)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[element : element + 1], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(GENEROUS_STEPS))
def test_a_full_budget_is_dense(name):
    calls = drifting(name, batch=2)
    with opened(name, GENEROUS_STEPS[name](), steps=TOTAL + 1) as run:
        found = outputs(run, calls)
    for output, call in zip(found, calls, strict=True):
        torch.testing.assert_close(output, dense(*call), rtol=1e-4, atol=1e-5)
    assert run.result.density == 1


@pytest.mark.parametrize("name", NAMES)
def test_shared_keys_are_the_same_as_repeated_ones(name):
    calls = drifting(name)
    shared, _ = sampled(name, calls)
    whole = [(q, *(x.repeat_interleave(2, dim=1) for x in rest)) for q, *rest in calls]
    repeated, _ = sampled(name, whole)
    for one, other in zip(shared, repeated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_stay_and_states_are_not_changed_in_place(name):
    calls = drifting(name)
    before = [[x.clone() for x in call] for call in calls]
    method, state, kept = STEPS[name](), None, []
    for number, call in enumerate(calls):
        attended = method.attend(
            AttentionCall(*call, 0.25, False),
            DenoisingStep(number, TOTAL, "", grid_for(name)),
            state,
        )
        kept.append((state, str(state)))
        state = attended.state
    assert all(str(state) == was for state, was in kept)
    for call, was in zip(calls, before, strict=True):
        assert all(map(torch.equal, call, was))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_queries_keys_and_values(name):
    calls = drifting(name)
    last = tuple(x.requires_grad_() for x in calls[-1])
    output = sampled(name, calls)[0][-1]
    grads = torch.autograd.grad(output.square().sum(), last)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(name):
    calls = drifting(name, dtype=torch.bfloat16)
    found, _ = sampled(name, calls)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in found)
    exact, _ = sampled(name, [tuple(x.float() for x in call) for call in calls])
    near = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert sorted(near)[len(near) // 2] < 0.02  # a choice may fall otherwise at a near tie


@pytest.mark.parametrize("name", NAMES)
def test_tokens_may_come_in_any_number(name):
    """Blocks that are ragged, and text behind the video."""
    grid = gs.TokenGrid(3, 5, 7, text=9, text_first=False)
    calls = drifting(name, grid=grid)
    method = STEPS[name]()
    if name.startswith("sparsevdit"):
        method = patterns_of(method, 114)
    with opened(name, method, grid=grid_for(name, grid)) as run:
        found = outputs(run, calls)
    assert all(x.isfinite().all() for x in found) and run.result.sparse_density < 1


def patterns_of(method, tokens):
    columns = {0: torch.arange(-(-tokens // 16)).expand(4, -1) < 3}
    return type(method)(block=16, modes=method.modes, columns=columns)


@pytest.mark.parametrize("name", ["sparsevdit", "rettention", "lightforcing"])
def test_methods_that_go_by_frames_need_a_grid(name):
    (call, *_) = drifting(name)
    with (
        pytest.raises(gs.UsageError, match="TokenGrid"),
        opened(name, grid=None) as run,
    ):
        run.step(0)
        run.attend(*call, layer=0)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: gs.attention.AdaSpa(density=0),
        lambda: gs.attention.AdaSpa(again=0),
        lambda: gs.attention.AdaSpa(block=0),
        lambda: gs.attention.SparseVDiT(penalty=-1),
        lambda: gs.attention.SparseVDiT(window=0),
        lambda: gs.attention.SVG2(share=0),
        lambda: gs.attention.SVG2(queries=0),
        lambda: gs.attention.Rettention(share=2),
        lambda: gs.attention.Rettention(reshape=1),
        lambda: gs.attention.PSA(by="mean"),
        lambda: gs.attention.PSA(shares=(0.5, 0.4, 0.6, 1)),
        lambda: gs.attention.PSA(block=20),
        lambda: gs.attention.PSA(caps=(1, 2)),
        lambda: gs.attention.LightForcing(density=0.1, base=0.2),
        lambda: gs.attention.LightForcing(schedule="rising"),
        lambda: gs.attention.VideoBLADE(pool=15, disjoint=True),
        lambda: gs.attention.VideoBLADE(least=0.2, most=0.1),
    ],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        bad()
