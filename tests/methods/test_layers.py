"""Every method that is a layer keeps what the role promises."""

import copy

import pytest
import torch
from examples import LAYERS

import gossamer as gs

NAMES = sorted(LAYERS)


def made(name, seed=0, dtype=torch.float32):
    """The layer in evaluation mode and a batch for it."""
    torch.manual_seed(seed)
    layer = LAYERS[name].make().to(dtype).eval()
    inputs = LAYERS[name].inputs(torch.Generator().manual_seed(seed))
    return layer, [x.to(dtype) if floating(x) else x for x in inputs]


def floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def run(layer, inputs):
    """The output; several are joined."""
    found = layer(*inputs)
    return torch.cat([x.flatten() for x in found]) if isinstance(found, tuple) else found


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_has_its_shape_and_inputs_stay(name, dtype):
    layer, inputs = made(name, dtype=dtype)
    before = copy.deepcopy(inputs)
    found = run(layer, inputs)
    assert found.shape == LAYERS[name].shape(*inputs) and found.dtype == dtype
    assert found.isfinite().all()
    for x, old in zip(inputs, before):
        assert not isinstance(x, torch.Tensor) or torch.equal(x, old)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_that_of_a_dense_map_under_the_same_mask(name):
    layer, inputs = made(name, seed=1)
    close(run(layer, inputs), LAYERS[name].masked(layer, *inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_is_dense_attention(name):
    torch.manual_seed(2)
    layer = LAYERS[name].full().eval()
    _, inputs = made(name, seed=2)
    generous = LAYERS[name].generous(*inputs)
    close(run(layer, generous), LAYERS[name].dense(layer, *inputs))
    sparse = LAYERS[name].make().eval()
    sparse.load_state_dict(layer.state_dict())
    cut, whole = run(sparse, inputs), run(layer, generous)
    assert cut.shape != whole.shape or not torch.allclose(cut, whole), "the example cuts nothing"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_but_those_that_are_named(name):
    layer, inputs = made(name)
    silent = LAYERS[name].silent
    layer.train()
    run(layer, inputs).square().sum().backward()
    for key, parameter in layer.named_parameters():
        if key.startswith(silent) and silent:
            assert parameter.grad is None or not parameter.grad.any(), key
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right(name):
    layer, inputs = made(name, dtype=torch.float64)
    keys = [
        k for k, _ in layer.named_parameters() if not LAYERS[name].silent or not k.startswith(LAYERS[name].silent)
    ]  # fmt: skip
    places = [i for i, x in enumerate(inputs) if floating(x)]
    wanted = [inputs[i].requires_grad_() for i in places]
    wanted += [layer.get_parameter(key) for key in keys]

    def call(*given):
        whole = list(inputs)
        for place, x in zip(places, given):
            whole[place] = x
        parameters = dict(zip(keys, given[len(places) :]))
        return torch.func.functional_call(layer, parameters, tuple(whole))

    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_all_there_is(name):
    layer, inputs = made(name)
    torch.manual_seed(9)
    other = LAYERS[name].make().eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(layer, inputs), run(other, inputs))
    assert torch.equal(run(layer, inputs), run(copy.deepcopy(layer), inputs))


@pytest.mark.parametrize("name", [name for name in NAMES if LAYERS[name].batched])
def test_each_input_of_a_batch_is_served_alone(name):
    layer, inputs = made(name)
    together = layer(*inputs)
    for i in range(len(together)):
        alone = [x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in inputs]
        close(together[i : i + 1], layer(*alone))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_and_changes_nothing(name):
    layer, inputs = made(name)
    before = copy.deepcopy(layer.state_dict())
    for bad in LAYERS[name].bad:
        with pytest.raises(gs.UsageError, match=type(layer).__name__):
            layer(*bad(*inputs))
    assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items())
    for options in LAYERS[name].refused:
        with pytest.raises(gs.UsageError, match=type(layer).__name__):
            type(layer)(**options)


def test_layers_are_modules_and_no_names_of_options():
    for name in NAMES:
        assert isinstance(LAYERS[name].make(), torch.nn.Module)
    with pytest.raises(gs.UsageError, match=r"drsformer is a layer.*gs\.attention\.DRSformer"):
        gs.prune(torch.nn.Linear(4, 4), "drsformer", density=0.5)
