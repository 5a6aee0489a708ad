"""R-Sparse: the share goes to columns or to rank, by the weight's spectrum."""

import numpy as np
import pytest
import torch

import gossamer as gs
from gossamer.core.activations import InputStats

WIDTH = 384


def drawn(spectrum):
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))[0] for _ in range(2))
    x = random.standard_t(4, (256, WIDTH))
    return torch.tensor((left * spectrum) @ right.T).float(), torch.tensor(x).float()


FALLING, FLAT = 1 / np.arange(1, WIDTH + 1), np.ones(WIDTH)


def error(weight, x, share):
    state = gs.activations.RSparse(share=share).prepare(weight, InputStats("layer"), 0.5)
    rest = x.masked_fill(gs.keep(state.score(x), gs.Fraction(state.density)), 0)
    away = rest @ weight.t()
    if state.bypass is not None:
        away = away - rest @ state.bypass[0].t() @ state.bypass[1].t()
    return float(away.norm() / (x @ weight.t()).norm())


def test_the_measured_errors():
    weight, x = drawn(FALLING)
    found = [error(weight, x, share) for share in (0.5, 1.0, 0.0)]
    assert found[0] == pytest.approx(0.050, abs=0.006)
    assert found[1] == pytest.approx(0.167, abs=0.06)  # by how heavy the tails of inputs are
    assert found[2] == pytest.approx(0.065, abs=0.006)
    weight, x = drawn(FLAT)
    assert error(weight, x, 1.0) == pytest.approx(0.207, abs=0.01)
    assert error(weight, x, 1.0) < error(weight, x, 0.5) < error(weight, x, 0.0)


@pytest.mark.parametrize(("spectrum", "best"), [(FALLING, {0.25, 0.5, 0.75}), (FLAT, {1.0})])
def test_the_search_finds_both(spectrum, best):
    weight, x = drawn(spectrum)
    state = gs.activations.RSparse().prepare(weight, InputStats("layer", x), 0.5)
    assert state.facts["share"] in best
    assert (state.bypass is None) == (best == {1.0})
    again = gs.activations.RSparse().prepare(weight, InputStats("layer", facts=state.facts), 0.5)
    assert again.density == state.density


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (128, 16), (2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_the_budget_counts_every_shape(shape, share, density):
    out, width = shape
    weight = torch.randn(out, width)
    state = gs.activations.RSparse(share=share).prepare(weight, InputStats("layer"), density)
    columns, rank = round(state.density * width), state.bypass[0].shape[0]
    assert columns >= 1 and rank >= 1
    least = out + (out + width)  # one column and rank one
    assert columns * out + rank * (out + width) <= max(density * out * width, least) + out + width


def test_the_low_rank_part_reads_what_is_not_kept_also_for_one_token():
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    data = [torch.randn(100, 64)]
    method = gs.activations.RSparse(share=0.5)
    with torch.no_grad(), gs.sparsify_activations(model, method, data, break_even=1.0) as run:
        for x in (torch.randn(1, 64), torch.randn(3, 64)):
            found = model(x)
            product = run.products["0"]
            kept = x.masked_fill(~product.mask(x), 0)
            down, up = product.state.bypass
            weight, bias = model[0].weight, model[0].bias
            want = kept @ weight.t() + (x - kept) @ down.t() @ up.t() + bias
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert run.result.held_bytes >= product.state.bypass[0].nbytes + product.state.bypass[1].nbytes


def test_all_columns_is_teal():
    weight = torch.randn(16, 32)
    state = gs.activations.RSparse(share=1).prepare(weight, InputStats("layer"), 0.5)
    assert state.scale is None and state.bypass is None and state.density == 0.5


@pytest.mark.parametrize("bad", [{"share": 2}, {"share": True}, {"density": 0}, {"density": 1.5}])
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        gs.activations.RSparse(**bad)
