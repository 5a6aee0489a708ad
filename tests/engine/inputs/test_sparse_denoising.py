"""Attention inside diffusion models: which calls are served, when runs begin, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer as gs

GRID = gs.TokenGrid(2, 4, 8, text=3)
METHOD = gs.attention.AdaSpa(density=0.5, block=8, first=0.25, again=0.5)


class Denoiser(nn.Module):
    """Two layers of self-attention, each before one of cross-attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x, words, **options):
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)
            q = x.unflatten(-1, (2, 8)).transpose(1, 2)
            w = words.unflatten(-1, (2, 8)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, w, w).transpose(1, 2).flatten(2)
        return x


def sample(model, run=None, steps=8, seed=0, branches=("",), **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, GRID.tokens, 16, generator=generator)
    words = torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        for number in range(steps):
            parts = []
            for branch in branches:
                if run is not None:
                    run.step(number, branch)
                parts.append(model(x, words if branch != "none" else 0 * words, **options))
            x = x + 0.1 * torch.stack(parts).mean(0)
    return x


def test_self_attention_is_served_and_cross_attention_left():
    model = Denoiser()
    with gs.sparse_denoising(model, METHOD, steps=8, grid=GRID) as run:
        found = sample(model, run)
        inside = F.scaled_dot_product_attention(*(torch.ones(1, 1, GRID.tokens, 8),) * 3)
    result = run.result
    assert (result.layers, result.calls, result.other_calls, result.runs) == (2, 16, 16, 1)
    # Dense: steps 0 and 1, and 2 with the search; then a search at step 6.
    assert (result.dense_calls, result.chosen_calls, result.reused_calls) == (6, 2, 8)
    assert result.states == 2 and result.state_bytes > 0
    assert 0.4 < result.sparse_density <= 0.5 and result.search_density == pytest.approx(4 / 16)
    assert not torch.equal(found, sample(model)) and inside.shape == (1, 1, GRID.tokens, 8)
    assert "AdaSpa" in str(result) and "reused: 8" in str(result)


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = Denoiser()
    before, hooks = sample(model), dict(model._forward_hooks)
    with pytest.raises(ZeroDivisionError), gs.sparse_denoising(model, METHOD, steps=8) as run:
        sample(model, run, steps=4)
        raise ZeroDivisionError
    assert torch.equal(sample(model), before)
    assert model._forward_hooks == hooks and not model._forward_pre_hooks


def test_a_full_budget_is_the_dense_sample():
    model = Denoiser()
    with gs.sparse_denoising(model, "blocksparse:block=8,density=1.0", steps=8) as run:
        found = sample(model, run)
    torch.testing.assert_close(found, sample(model), rtol=1e-4, atol=1e-5)
    assert run.result.chosen_calls == 16 and run.result.density == 1


def test_runs_begin_anew_and_branches_have_their_own_states():
    model = Denoiser()
    with gs.sparse_denoising(model, METHOD, steps=8, grid=GRID) as run:
        first = sample(model, run)
        sample(model, run, steps=5, seed=1)  # broken off
        second = sample(model, run)
    assert torch.equal(first, second) and run.result.runs == 3
    with gs.sparse_denoising(model, METHOD, steps=8, grid=GRID) as run:
        sample(model, run, branches=("text", "none"))
    assert run.result.states == 4 and run.result.runs == 1 and run.result.calls == 32


def test_steps_are_named_in_order():
    with gs.sparse_denoising(None, METHOD, steps=8) as run:
        x = torch.randn(1, 2, 64, 8)
        with pytest.raises(gs.UsageError, match=r"run\.step"):
            run.attend(x, x, x, layer=0)
        for bad in (-1, 8, 1.0, True):
            with pytest.raises(gs.UsageError, match="step"):
                run.step(bad)
        run.step(0)
        run.step(3)
        with pytest.raises(gs.UsageError, match=r"came twice.*run\.reset"):
            run.step(3)
        run.step(3, "none")
        assert run.result.runs == 1
        run.reset()
        run.step(3)
        run.step(2)  # a lower number begins a new run
        assert run.result.runs == 3
        run.attend(x, x, x, layer=0)
        with pytest.raises(gs.UsageError, match=r"shape .* in one run"):
            run.attend(*(x.expand(2, -1, -1, -1),) * 3, layer=0)
    assert run.result.calls == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"is_causal": True}, "causal"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"attn_mask": torch.ones(GRID.tokens, GRID.tokens).tril().bool()}, "mask"),
        ({"attn_mask": torch.randn(GRID.tokens, GRID.tokens)}, "mask"),
    ],
)
def test_attention_that_cannot_be_served_is_refused(options, match):
    model = Denoiser()
    with (
        pytest.raises(gs.UsageError, match=f"layer 0.*{match}"),
        gs.sparse_denoising(model, METHOD, steps=8) as run,
    ):
        sample(model, run, **options)


def test_a_mask_of_everything_is_none():
    model = Denoiser()
    mask = torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool)
    with gs.sparse_denoising(model, METHOD, steps=8) as run:
        found = sample(model, run, attn_mask=mask)
    with gs.sparse_denoising(model, METHOD, steps=8) as run:
        assert torch.equal(sample(model, run), found)


def test_nothing_reached_and_nothing_sparse_are_refused():
    model = Denoiser()
    with (
        pytest.raises(gs.UsageError, match=r"no self-attention was reached.*run the model inside"),
        gs.sparse_denoising(model, METHOD, steps=8) as run,
    ):
        run.step(0)
    with (
        pytest.raises(gs.UsageError, match=r"67 queries with 67 keys: does the grid fit"),
        gs.sparse_denoising(model, METHOD, steps=8, grid=gs.TokenGrid(2, 4, 8)) as run,
    ):
        sample(model, run)
    with (
        pytest.raises(gs.UsageError, match=r"every call of a run of 2 steps was dense"),
        gs.sparse_denoising(model, METHOD, steps=2) as run,
    ):
        sample(model, run, steps=2)
    with gs.sparse_denoising(model, METHOD, steps=8) as run:
        sample(model, run, steps=2)  # the run is not over
    assert run.result.dense_calls == 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": gs.attention.AdaSpa}, "is the class"),
        ({"method": gs.weights.Wanda()}, "no method of attention for diffusion"),
        ({"method": "wanda"}, "one of weights"),
        ({"steps": 0}, "steps"),
        ({"grid": (2, 4, 8)}, "TokenGrid"),
        ({"model": "model"}, "torch module"),
    ],
)
def test_what_is_no_fit_is_refused(arguments, match):
    given = {"model": Denoiser(), "method": METHOD, "steps": 8} | arguments
    with (
        pytest.raises(gs.UsageError, match=match),
        gs.sparse_denoising(given.pop("model"), given.pop("method"), **given),
    ):
        pass
    with pytest.raises(gs.UsageError, match="frames"):
        gs.TokenGrid(0, 4, 4)


def test_a_method_of_steps_is_none_of_prompts():
    x = torch.randn(1, 2, 64, 8)
    with pytest.raises(gs.UsageError, match=r"diffusion models.*gs\.sparse_denoising"):
        gs.attend(x, x, x, METHOD, causal=False)


def test_calibration_watches_every_layer_and_leaves_the_model():
    model = Denoiser().train()
    before = sample(model)
    method = gs.calibrate_denoising(
        model, gs.attention.SparseVDiT(block=8), lambda run: sample(model, run), steps=8, grid=GRID
    )
    assert sorted(method.modes) == [0, 1] and all(len(each) == 2 for each in method.modes.values())
    assert model.training and torch.equal(sample(model), before)
    with pytest.raises(gs.UsageError, match="learns nothing"):
        gs.calibrate_denoising(model, METHOD, lambda run: None, steps=8)
    with pytest.raises(gs.UsageError, match="no self-attention was reached"):
        gs.calibrate_denoising(model, method, lambda run: None, steps=8, grid=GRID)


def test_gradients_flow_while_it_trains():
    model = Denoiser()
    x = torch.randn(1, GRID.tokens, 16)
    with gs.sparse_denoising(model, METHOD, steps=8, grid=GRID) as run:
        for number in (2, 3):
            run.step(number)
            loss = model(x, x[:, :5]).square().mean()
    loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in model.layers)
    assert run.result.reused_calls == 2


def test_models_of_transformers_are_served_through_sdpa():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=4,
    )  # fmt: skip
    model = ViTModel(config).eval()
    with gs.sparse_denoising(model, METHOD, steps=8) as run, torch.no_grad():
        for number in range(8):
            run.step(number)
            model(torch.randn(1, 3, 32, 32))
    assert (run.result.layers, run.result.calls) == (2, 16)
