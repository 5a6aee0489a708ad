"""Angles of blocks are those of the hidden states that a hook sees, and decide densities."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.engine.hooks import evaluating
from gossamer.engine.prune.around import gather_angles
from gossamer.engine.prune.calibrate import Calibrator
from gossamer.models import choose_weights, find_blocks


def angles_of(model, batches):
    weights = choose_weights(model).weights
    blocks = find_blocks(model)
    with evaluating(model):
        return gather_angles(Calibrator(model, blocks, weights, batches), blocks)


def by_hooks(model, batches, masks):
    """Mean angle over tokens, from hooks of our own and an arc cosine in float64."""
    found = [[] for _ in find_blocks(model)]
    model = copy.deepcopy(model).double()
    now = {}

    def hook(index):
        def see(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before, after, dim=-1)[now["mask"]]
            found[index].append(cosine.clamp(-1, 1).arccos() / torch.pi)

        return see

    for index, (_, module) in enumerate(find_blocks(model)):
        module.register_forward_hook(hook(index), with_kwargs=True)
    with torch.no_grad():
        for batch, mask in zip(batches, masks):
            now["mask"] = mask
            model.eval()(**batch)
    return [float(torch.cat(parts).mean()) for parts in found]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_angles_are_those_of_the_hidden_states_without_padding(tiny, family):
    model, batches = tiny(family)
    shape = batches[0]["input_ids"].shape
    masks = [batch.get("attention_mask", torch.ones(shape)).bool() for batch in batches]
    found = angles_of(model, batches)
    assert [x.name for x in found] == [name for name, _ in find_blocks(model)]
    assert [x.count for x in found] == [int(sum(mask.sum() for mask in masks))] * 2
    want = by_hooks(model, batches, masks)
    assert [x.angle for x in found] == pytest.approx(want, rel=1e-4)


def test_densities_follow_the_blocks_and_meet_the_budget(tiny):
    model, batches = tiny("llama")
    angles = [x.angle for x in angles_of(model, batches)]
    method, allocation = gs.weights.Magnitude(), gs.BlockInfluence(8.0)
    result = gs.prune(model, method, density=0.5, allocation=allocation, data=batches)
    asked = {x.name: x.requested_density for x in result.layers}
    first, second = ({v for k, v in asked.items() if f".layers.{n}." in k} for n in (0, 1))
    assert len(first) == len(second) == 1 and first != second
    assert (first.pop() > second.pop()) == (angles[0] > angles[1])
    assert result.measured_density == pytest.approx(0.5, abs=1e-3)
    assert gs.prune(
        tiny("llama")[0], "magnitude", density=0.5, allocation="influence:sharpness=8", data=batches
    ).measured_density == pytest.approx(0.5, abs=1e-3)


def test_what_has_no_hidden_state_is_refused_before_anything_changes(tiny):
    model, batches = tiny("mlp")
    before = copy.deepcopy(model.state_dict())
    arguments = {"density": 0.5, "allocation": gs.BlockInfluence()}
    with pytest.raises(gs.UsageError, match="gives no hidden state of the shape"):
        gs.prune(model, "magnitude", data=batches, **arguments)
    with pytest.raises(gs.UsageError, match="BlockInfluence needs calibration data"):
        gs.prune(model, "magnitude", **arguments)
    model, batches = tiny("cnn")
    with pytest.raises(gs.UsageError, match="with blocks"):
        gs.prune(model, "magnitude", data=batches, **arguments)
    model, batches = tiny("mlp")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_allocation_that_asks_for_what_is_not_gathered_is_refused(tiny):
    class Odd(gs.Uniform):
        needs = ("colour",)

    model, batches = tiny("mlp")
    with pytest.raises(gs.UsageError, match="Odd needs colour"):
        gs.prune(model, "magnitude", density=0.5, allocation=Odd(), data=batches)
