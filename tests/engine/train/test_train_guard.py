"""What a sparse run notices: other weights than it masks, averages, wrappers, changes mid-run."""

import copy

import pytest
import torch
import torch.nn.utils as U
from torch import nn
from torch.nn.utils import parametrizations as P
from torch.nn.utils import parametrize
from torch.nn.utils import prune as tp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gossamer as gs

METHODS = {
    "rigl": lambda: gs.weights.RigL(0.2, every=2),
    "gmp": lambda: gs.weights.GMP(0.2, every=2),
    "srste": lambda: gs.weights.SRSTE(decay=0.01),
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def advance(model, optimizer, steps=1):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        (model(x.to(model[0].weight.dtype)) - 1).square().mean().backward()
        optimizer.step()


def opened(model, optimizer, method, **more):
    return gs.sparse_training(model, optimizer, method, **{"total_steps": 12, **more})


def assert_inside(run):
    for layer in run.layers:
        assert not layer.matrix(layer.weight)[~run.masks[layer.name]].any(), layer.name


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


RECOMPUTED = {
    "weight_norm": (P.weight_norm, "remove_parametrizations"),
    "orthogonal": (P.orthogonal, "remove_parametrizations"),
    "spectral_norm": (P.spectral_norm, "remove_parametrizations"),
    "own": (lambda m: parametrize.register_parametrization(m, "weight", Halved()), "Halved"),
    "old weight_norm": (U.weight_norm, "remove_weight_norm"),
    "old spectral_norm": (U.spectral_norm, "remove_spectral_norm"),
    "torch's masks": (lambda m: tp.l1_unstructured(m, "weight", 0.8), r"prune\.remove"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_recomputed_weight_is_refused_with_the_remedy(name):
    wrap, remedy = RECOMPUTED[name]
    model = build()
    wrap(model[2])
    model(torch.randn(2, 16))
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if "._" not in k})
    method = gs.weights.StaticRandom(0.3)
    for use in (
        lambda: opened(model, sgd(model), gs.weights.FixedMasks()).__enter__(),
        lambda: gs.sparse_layers(model, method),
        lambda: gs.train_rounds(model, gs.weights.IMP(0.3, rounds=1), lambda *_: None),
    ):
        with pytest.raises(gs.UsageError, match=f"2: its weight is recomputed.*{remedy}"):
            use()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "_u" not in k)
    with opened(model, sgd(model), method, exclude=("2",)) as run:
        assert list(run.masks) == ["0", "4"] or list(run.masks) == ["0"]


def test_torchs_masks_are_taken_over_as_the_message_says():
    model = build()
    tp.l1_unstructured(model[0], "weight", 0.8)
    tp.remove(model.get_submodule("0"), "weight")
    zero = model[0].weight == 0
    optimizer = sgd(model)
    with opened(model, optimizer, gs.weights.FixedMasks()):
        advance(model, optimizer, 3)
    assert zero.sum() > 400 and not model[0].weight[zero].any()


def test_recomputed_scales_of_norms_are_refused():
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
    parametrize.register_parametrization(model[1], "weight", Halved())
    with (
        pytest.raises(gs.UsageError, match=r"1: its weight is recomputed.*Halved"),
        opened(
            model,
            sgd(model),
            gs.weights.MaskSparsity(0.5, (gs.Coupled(8, ("0",), ("1",), (), ()),)),
        ),
    ):
        pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize("kind", ["subclass", "instance", "hook", "parent"])
def test_sparse_layers_do_not_drop_what_a_layer_does_besides(kind):
    model = build()
    if kind == "subclass":
        model[0] = Scaled(16, 32)
    elif kind == "instance":
        model[0].forward = lambda x: x @ model[0].weight.t() * 2
    elif kind == "hook":
        model[0].register_forward_hook(lambda module, x, y: y * 2)
    else:
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 4))
    before = {name: type(module) for name, module in model.named_modules()}
    match = {"hook": "hooks hang on it", "parent": "reads its weight", "instance": "replaced"}.get(
        kind, "forward of its own"
    )
    with pytest.raises(gs.UsageError, match=match):
        gs.sparse_layers(model, gs.weights.StaticRandom(0.3))
    assert before == {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_those_of_the_model_inside(wrap, method):
    model = build()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with opened(wrapped, optimizer, METHODS[method](), include=("4",), exclude=("2",)) as run:
        optimizer.zero_grad()
        wrapped(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        assert list(run.masks) == ["0", "4"] and run.model is model
    nested = nn.DataParallel(torch.compile(build(), backend="eager"))
    with opened(nested, torch.optim.SGD(nested.parameters(), lr=0.1), METHODS[method]()) as run:
        assert all(name[0].isdigit() for name in run.masks)
    sparse = gs.sparse_layers(nn.DataParallel(build()), gs.weights.SET(0.3), exclude=("2",))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    with gs.true_sparse_training(sparse, optimizer, gs.weights.SET(0.3), total_steps=3) as run:
        assert "0" in run.layers and "2" not in run.layers


class Named(nn.Module):
    """Has attributes that wrappers have too."""

    def __init__(self):
        super().__init__()
        self.model, self.module = build(), nn.Linear(4, 4)

    def forward(self, x):
        return self.module(self.model(x))


def test_a_result_and_a_model_with_parts_called_model_are_seen_through():
    compiled = torch.compile(Named(), backend="eager")
    with opened(
        compiled, torch.optim.SGD(compiled.parameters(), lr=0.1), gs.weights.SET(0.3)
    ) as run:
        assert "model.0" in run.masks
    result = gs.prune(build(), gs.weights.Magnitude(), density=0.3)
    with opened(result, sgd(result.model), gs.weights.FixedMasks()) as run:
        assert run.model is result.model and set(run.masks) == set(result.supports)
    with (
        pytest.raises(gs.UsageError, match="expected a torch module"),
        opened([], None, gs.weights.FixedMasks()),
    ):
        pass


def test_sparse_layers_that_thaw_are_an_error():
    method = gs.weights.SET(0.3)
    model = gs.sparse_layers(build(), method)
    model[2].values.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.true_sparse_training(model, optimizer, method, total_steps=4) as run:
        assert "2" not in run.layers
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
        model[2].values.requires_grad_(True)
        with pytest.raises(gs.UsageError, match="2: was frozen"):
            optimizer.step()


def test_rounds_of_a_wrapped_model_train_the_wrapper():
    model, given = nn.DataParallel(build()), []

    def train(net, trainer, part):
        given.append(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with gs.sparse_training(net, optimizer, trainer, total_steps=3, exclude=("2",)):
            advance(net.module, optimizer, 1)

    result = gs.train_rounds(model, gs.weights.IMP(0.3, rounds=1), train, exclude=("2",))
    assert all(net is model for net in given) and "0" in result.supports


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_thaws_is_an_error(method):
    model = build()
    model[2].requires_grad_(False)
    optimizer = sgd(model)
    with opened(model, optimizer, METHODS[method]()) as run:
        advance(model, optimizer)
        model[2].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        with pytest.raises(gs.UsageError, match="2: was frozen"):
            advance(model, optimizer)
        model[2].requires_grad_(False)
        advance(model, optimizer)
        assert run.step == 2
    model[2].requires_grad_(False)
    optimizer = sgd(model)
    with opened(model, optimizer, METHODS[method](), exclude=("2",)):
        model[2].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        advance(model, optimizer)
    assert model[2].weight.all()


@pytest.mark.parametrize("method", METHODS)
def test_a_replaced_parameter_is_an_error_and_replaced_data_is_not(method):
    model = build()
    optimizer = sgd(model)
    with opened(model, optimizer, METHODS[method]()) as run:
        advance(model, optimizer, 4)
        model[0].weight.data = model[0].weight.data.clone() * 0.5
        kept = model[0].weight.detach().clone()
        optimizer.zero_grad()
        model[0].weight.grad = torch.zeros_like(kept)
        optimizer.param_groups[0]["momentum"] = 0.0
        run.before_step()
        if run.method.keeps_dense_weights:  # what lies behind learned of the change
            mask = run.masks["0"]
            assert torch.equal(run._hidden["0"][mask], kept[mask])
        run.after_step()
        old = model[0].weight
        model[0].weight = nn.Parameter(old.detach().clone())
        optimizer.zero_grad()
        for p in (old, *model.parameters()):
            p.grad = torch.ones_like(p)
        with pytest.raises(gs.UsageError, match="0: its weight was replaced"):
            optimizer.step()
        model[0].weight = old
        advance(model, optimizer)
        assert_inside(run)


@pytest.mark.parametrize("method", METHODS)
def test_dtype_and_optimizer_state_may_change_mid_run(method):
    model = build()
    optimizer = sgd(model)
    with opened(model, optimizer, METHODS[method]()) as run:
        advance(model, optimizer, 3)
        other = build(1)
        dense = sgd(other)
        advance(other, dense, 3)  # momentum everywhere
        optimizer.load_state_dict(dense.state_dict())
        advance(model, optimizer, 1)
        assert_inside(run)
        model.double()
        optimizer.load_state_dict(optimizer.state_dict())
        advance(model, optimizer, 3)
        assert_inside(run)
        assert run.step == 7 and model[0].weight.dtype == torch.float64


def test_weights_loaded_inside_the_block_are_told_and_mended():
    model, best = build(), build(5).state_dict()
    optimizer = sgd(model)
    with opened(model, optimizer, METHODS["rigl"]()) as run:
        advance(model, optimizer, 2)
        model.load_state_dict(best)
        with pytest.raises(gs.UsageError, match=r"apply_to\(model\)"):
            run.check()
        dropped = run.apply_to(model)
        norms = [best[f"{n}.weight"].norm() ** 2 for n in run.masks]
        kept = [model.get_submodule(n).weight.detach().norm() ** 2 for n in run.masks]
        assert dropped == pytest.approx(float(1 - sum(kept) / sum(norms)) ** 0.5, rel=1e-4)
        assert run.density == pytest.approx(0.2, abs=0.01)
        advance(model, optimizer)


def test_averages_are_masked_to_the_last_support():
    model = build()
    optimizer = sgd(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with opened(model, optimizer, gs.weights.SET(0.2, every=2)) as run:
        for _ in range(8):
            advance(model, optimizer)
            ema.update_parameters(model)
        dense = {n: ema.module.get_submodule(n).weight.detach().clone() for n in run.masks}
        assert any((dense[n] != 0)[~run.masks[n]].any() for n in run.masks)
        dropped = run.apply_to(ema)
        assert 0 < dropped < 1
        for name, mask in run.masks.items():
            now = ema.module.get_submodule(name).weight
            assert torch.equal(now, dense[name] * mask)
        assert run.apply_to(ema) == 0
        with pytest.raises(gs.UsageError, match="no weight of shape"):
            run.apply_to(build()[0])
        with pytest.raises(gs.UsageError, match="no module"):
            run.apply_to(ema.state_dict())
    with (
        pytest.raises(gs.UsageError, match="average"),
        opened(ema, sgd(model), gs.weights.FixedMasks()),
    ):
        pass


def test_an_average_over_a_fixed_support_keeps_it_by_itself():
    model = build()
    optimizer = sgd(model)
    ema = AveragedModel(model)
    with opened(model, optimizer, gs.weights.StaticRandom(0.2)) as run:
        for _ in range(3):
            advance(model, optimizer)
            ema.update_parameters(model)
        assert run.apply_to(ema) == 0


def test_a_swap_of_averaged_weights_is_seen_while_it_lasts():
    model = build()
    optimizer = sgd(model)
    with opened(model, optimizer, METHODS["rigl"]()) as run:
        advance(model, optimizer)
        mine = copy.deepcopy(model.state_dict())
        model.load_state_dict(build(3).state_dict())
        with pytest.raises(gs.UsageError, match="weights outside"):
            run.state_dict()
        model.load_state_dict(mine)
        assert run.state_dict()["step"] == 1


def test_a_block_without_steps_is_no_error():
    for method in METHODS.values():
        model = build()
        with opened(model, sgd(model), method()) as run:
            assert run.state_dict()["step"] == 0
            model.eval()(torch.randn(2, 16))
        assert run.step == 0 and 0 < run.density <= 1


def test_huge_finite_gradients_pass_and_infinite_ones_do_not():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-38)
    with opened(model, optimizer, gs.weights.StaticRandom(0.5)) as run:
        for p in model.parameters():
            p.grad = torch.full_like(p, 3e38)
        optimizer.step()
        model[2].weight.grad[0, 0] = float("-inf")
        with pytest.raises(gs.NonFiniteError, match="2: its gradient"):
            optimizer.step()
        assert run.step == 1


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.rnn = nn.Linear(16, 16), nn.LSTM(16, 16, batch_first=True)
        self.words, self.lm_head = nn.Embedding(200, 16, padding_idx=0), nn.Linear(16, 16)

    def forward(self, x):
        return self.lm_head(self.rnn(self.body(x))[0])


@pytest.mark.parametrize(
    ("include", "match"),
    [((), r"rnn\.weight_ih_l0: 50% .*freeze it"), (("lm_head",), r"(rnn|lm_head).*not hold")],
)
def test_keep_names_zeros_that_it_would_not_hold(include, match):
    model = gs.prune(Mixed(), gs.weights.Magnitude(), density=0.5, include=include).model
    with (
        pytest.raises(gs.UsageError, match=match),
        opened(model, sgd(model), gs.weights.FixedMasks()),
    ):
        pass
    model.rnn.requires_grad_(False)
    for more in ({"include": include}, {"exclude": ("lm_head",)}):
        with opened(model, sgd(model), gs.weights.FixedMasks(), **more) as run:
            assert "body" in run.masks
    if include:
        with pytest.raises(gs.UsageError, match=r"lm_head.*include="):
            opened(model, sgd(model), gs.weights.FixedMasks()).__enter__()


class Standardised(nn.Linear):
    """As in timm's ScaledStdConv2d: the stored weight is not the one that multiplies."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


def test_what_trains_dense_is_named(caplog):
    model = nn.Sequential(nn.Linear(8, 8), Standardised(8, 8), nn.LSTM(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gs.sparse_training(model, optimizer, gs.weights.RigL(density=0.5), total_steps=4) as run:
        assert [layer.name for layer in run.layers] == ["0"]
        assert sorted(run.left_out) == ["1", "2.weight_hh_l0", "2.weight_ih_l0"]
        assert "forward of its own" in run.left_out["1"]
    assert "1 and 2 more train dense" in caplog.text
