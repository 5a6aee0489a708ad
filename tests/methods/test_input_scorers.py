"""Every method that chooses inputs keeps what the role promises."""

import pytest
import torch
from examples import INPUTS
from torch import nn

import gossamer as gs
from gossamer.core.activations import InputStats
from gossamer.engine.hooks import observe_inputs
from gossamer.nn.active import DENSE, FEW, MASKED, ONE, ROWS

NAMES = sorted(INPUTS)
KERNEL = {"break_even": float("inf"), "loss": False}


class Small(nn.Module):
    """Two halves as in a gated transformer block, without attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.k_proj = nn.Linear(48, 48)
        self.o_proj = nn.Linear(48, 48, bias=False)
        self.gate_proj = nn.Linear(48, 80)
        self.up_proj = nn.Linear(48, 80)
        self.down_proj = nn.Linear(80, 48)

    def forward(self, x):
        x = x + self.o_proj(self.k_proj(x))
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def data(tokens=300, seed=1):
    return [torch.randn(tokens, 48, generator=torch.Generator().manual_seed(seed))]


def opened(name, model, density=0.5, **options):
    return gs.sparsify_activations(
        model, INPUTS[name](), data(), density=density, **{**KERNEL, **options}
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.4, 0.75])
def test_masks_keep_the_budget(name, density):
    model, seen = Small(), {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), observe_inputs(layers, seen.__setitem__):
        model(data()[0])
    with torch.no_grad(), opened(name, model, density, prefill="sparse") as run:
        model(data()[0])
        for layer, product in run.products.items():
            asked = run.plan.layers[layer].state.density
            mask = product.mask(seen[layer])  # of what the layer saw in calibration
            assert float(mask.float().mean()) == pytest.approx(asked, abs=0.015)
            if isinstance(product.budget, gs.Fraction):
                count = gs.keep(seen[layer], gs.Fraction(asked)).sum(-1)
                assert torch.equal(mask.sum(-1), count)
    told = {each.name: each for each in run.result.layers}
    assert told["gate_proj"].ways == {MASKED: 1} and told["k_proj"].union > 0.9
    # what comes behind masked layers is smaller, and so is its density
    assert 0.35 * density < run.result.density <= density + 0.06
    assert run.plan.density <= density + 0.06


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [*range(1, 10), 64])
def test_every_number_of_tokens_is_its_masked_product(name, tokens):
    model = Small()
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad(), opened(name, model) as run:
        for layer, product in run.products.items():
            inputs = x if product.width == 48 else x.repeat(1, 2)[:, :80]
            before = dict(product.counts.ways)
            found = product(inputs)
            given = inputs if product.rotation is None else product.rotation(inputs)
            kept = given.masked_fill(~product.mask(inputs), 0)
            weight = product.columns.to_float().t()
            want = kept if tokens <= FEW else given
            y = nn.functional.linear(want, weight, product.bias)
            if product.state.bypass is not None and tokens <= FEW:
                down, up = product.state.bypass
                y = y + (given - kept) @ down.t() @ up.t()
            torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
            way = next(w for w, n in product.counts.ways.items() if n != before.get(w, 0))
            allowed = {1: {ONE}}.get(tokens, {ROWS, MASKED} if tokens <= FEW else {DENSE})
            assert way in allowed, (layer, way)


@pytest.mark.parametrize("name", NAMES)
def test_full_density_is_dense_bit_for_bit(name):
    model = Small()
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 48)
        with torch.no_grad():
            want = model(x)
            with opened(name, model, 1.0) as run:
                assert torch.equal(model(x), want)
        assert not run.products


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("simulate", [False, True])
def test_the_model_is_restored_bit_for_bit_also_after_an_error(name, simulate):
    model = Small()
    before, x = copied(model), torch.randn(1, 48)
    addresses = {n: p.stride() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(x)
        with opened(name, model, simulate=simulate):
            assert not torch.equal(model(x), want)
            assert same(copied(model), before)
        assert torch.equal(model(x), want)
        with pytest.raises(RuntimeError, match="inside"), opened(name, model, simulate=simulate):
            raise RuntimeError("inside")
    assert same(copied(model), before) and torch.equal(model(x), want)
    assert {n: p.stride() for n, p in model.named_parameters()} == addresses
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat(name):
    x, found = torch.randn(1, 48), []
    for _ in range(2):
        model = Small()
        with torch.no_grad(), opened(name, model) as run:
            found.append((model(x), run.plan.to_json(), run.result.layers))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


@pytest.mark.parametrize("name", NAMES)
def test_a_token_has_the_same_inputs_alone_and_in_a_batch(name):
    model = Small()
    x = torch.randn(6, 48)
    with torch.no_grad(), opened(name, model) as run:
        for product in run.products.values():
            inputs = x if product.width == 48 else x.repeat(1, 2)[:, :80]
            rows = torch.cat([product.mask(row) for row in inputs.split(1)])
            assert torch.equal(product.mask(inputs), rows)
            alone = torch.cat([product(row) for row in inputs.split(1)])
            torch.testing.assert_close(product(inputs), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_simulation_is_the_kernel_in_masks(name):
    x = torch.randn(1, 48)
    found = []
    for simulate in (False, True):
        model = Small()
        with torch.no_grad(), opened(name, model, simulate=simulate) as run:
            found.append(model(x))
            assert {layer.served for layer in run.result.layers} <= (
                {"masked"} if simulate else {"columns"}
            )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_simulation_has_gradients(name):
    model = Small()
    with opened(name, model, simulate=True, prefill="sparse"):
        model(torch.randn(12, 48)).square().sum().backward()
    assert model.down_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_survive_a_file(name, dtype, tmp_path):
    model, x = Small().to(dtype), torch.randn(1, 48, dtype=dtype)
    batches = [batch.to(dtype) for batch in data()]
    plan = gs.calibrate_activations(model, INPUTS[name](), batches)
    again = gs.load_activations(plan.save(tmp_path / "plan.json"), model)
    assert again.to_json() == plan.to_json() and repr(again.method) == repr(plan.method)
    found = []
    for each in (plan, again):
        with torch.no_grad(), gs.sparsify_activations(model, each, break_even=1.0):
            found.append(model(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_state_s(name):
    method, weight = INPUTS[name](), torch.randn(20, 48)
    stats = InputStats("a.k_proj", torch.randn(64, 48))
    state = method.prepare(weight, stats, 0.5)
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    assert torch.equal(method.score(x, state), state.score(x))
    assert method.score(x, state).dtype == torch.float32 and (method.score(x, state) >= 0).all()


@pytest.mark.parametrize("kind", [gs.activations.TEAL, gs.activations.WINA])
@pytest.mark.parametrize(
    "bad", [{"density": 0}, {"density": 1.2}, {"allocation": "best"}, {"step": 0}, {"step": True}]
)
def test_bad_options_are_refused(kind, bad):
    with pytest.raises(gs.UsageError):
        kind(**bad)
