"""WINA: gains come from unequal columns and from the rotation, and from nothing else."""

import pytest
import torch

import gossamer as gs
from gossamer.core.activations import InputStats
from gossamer.engine.inputs.activations.calibrate import turned

WIDTH, DENSITY = 256, 0.35


def drawn(spread):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    return x, weight * torch.exp(spread * torch.randn(WIDTH, generator=generator))


def error(method, weight, x, rotate=False):
    """Relative, of the layer's output."""
    rotation = method.rotations({"layer": weight})["layer"] if rotate else None
    weight, x = turned(weight, rotation), x if rotation is None else x @ rotation
    state = method.prepare(weight, InputStats("layer"), DENSITY)
    mask = gs.keep(method.score(x, state), gs.Fraction(DENSITY))
    y = x @ weight.t()
    return float((y - x.masked_fill(~mask, 0) @ weight.t()).norm() / y.norm())


TEAL = gs.activations.TEAL(DENSITY)
WINA = gs.activations.WINA(DENSITY, norms="all")


def test_equal_columns_bring_nothing():
    x, weight = drawn(0.0)
    teal, wina = error(TEAL, weight, x), error(WINA, weight, x)
    assert teal == pytest.approx(0.413, abs=0.005) and wina == pytest.approx(0.412, abs=0.005)
    assert abs(teal - wina) < 0.005


def test_unequal_columns_bring_much():
    x, weight = drawn(1.0)
    assert error(TEAL, weight, x) == pytest.approx(0.417, abs=0.02)
    assert error(WINA, weight, x) == pytest.approx(0.141, abs=0.03)


def test_the_rotation_makes_columns_orthogonal_and_brings_more():
    x, weight = drawn(0.75)
    turns = WINA.rotations({"layer": weight})["layer"]
    assert torch.allclose(turns.t() @ turns, torch.eye(WIDTH), atol=1e-4)
    gram = turned(weight, turns).t() @ turned(weight, turns)
    assert float((gram - gram.diag().diag()).norm() / gram.norm()) < 1e-4
    assert torch.allclose(turned(weight, turns) @ (x @ turns).t(), weight @ x.t(), atol=2e-2)
    assert error(WINA, weight, x, rotate=True) == pytest.approx(0.155, abs=0.03)
    rotated = gs.activations.WINA(DENSITY, norms="leading")
    plain = turned(weight, turns)
    assert error(rotated, plain, x @ turns) == pytest.approx(0.411, abs=0.02)  # as TEAL has it
    assert error(WINA, weight, x, rotate=True) < error(WINA, weight, x)


def test_with_orthogonal_columns_no_other_choice_is_better():
    x, weight = drawn(0.75)
    turns = WINA.rotations({"layer": weight})["layer"]
    weight, x = turned(weight, turns)[:, :10], (x @ turns)[:40, :10]
    state = WINA.prepare(weight, InputStats("layer"), 0.3)
    mask = gs.keep(WINA.score(x, state), gs.TopK(3))
    chosen = (x.masked_fill(mask, 0) @ weight.t()).norm(dim=1)
    for places in torch.combinations(torch.arange(10), 3):
        other = x.clone()
        other[:, places] = 0
        assert bool(((other @ weight.t()).norm(dim=1) >= chosen - 1e-3).all())


def test_norms_are_those_of_columns_and_of_leading_layers():
    weight = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    method = gs.activations.WINA()
    assert method.prepare(weight, InputStats("a.k_proj"), 0.5).scale.tolist() == [5, 1]
    assert method.prepare(weight, InputStats("a.q_proj"), 0.5).scale is None


def test_the_rotation_is_paid_for(tiny_llama):
    model, data = tiny_llama(), [torch.randint(256, (4, 48))]
    told = {}
    for rotate in ("off", "leading", "all"):
        method = gs.activations.WINA(0.3, rotate=rotate, allocation="uniform")
        with gs.sparsify_activations(model, method, data, break_even=float("inf")) as run:
            gs.generate(model, data[0][:1, :12], 3, eos=())
        told[rotate] = run.result
    width = model.config.hidden_size
    for rotate in ("leading", "all"):
        extra = told[rotate].added_bytes - told["off"].added_bytes
        assert extra == 2 * len(model.model.layers) * width**2 * 4
        assert told[rotate].bytes - told["off"].bytes == extra
        assert told[rotate].held_bytes > extra > 0
    assert told["all"].held_bytes > told["leading"].held_bytes


def test_leading_layers_turn_alone_unless_all_are_to():
    weights = {"a.q_proj": torch.randn(8, 8), "a.k_proj": torch.randn(4, 8)}
    assert list(gs.activations.WINA().rotations(weights)) == ["a.k_proj"]
    every = gs.activations.WINA(rotate="all").rotations(weights)
    assert list(every) == list(weights) and every["a.q_proj"] is every["a.k_proj"]
    assert not gs.activations.WINA(rotate="off").rotations(weights)
    assert not gs.activations.WINA().rotations({"a.o_proj": torch.randn(8, 8)})


def test_a_model_without_the_layers_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    with pytest.raises(gs.UsageError, match="k_proj and gate_proj, and the model has neither"):
        gs.calibrate_activations(model, "wina", [torch.randn(100, 8)])
    method = gs.activations.WINA(norms="all", allocation="uniform")
    assert gs.calibrate_activations(model, method, [torch.randn(100, 8)]).density == 0.5
