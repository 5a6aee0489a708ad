"""A packed layer behaves like the layer whose place it took, in whatever way it is called."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn import NMLinear, PackedConv2d, QuantizedLinear, prepare_large_batches

KINDS = ["bitmap", "prepared", "columns", "blocks", "nm", "nm prepared", "int8", "conv", "chain"]
LINEAR = KINDS[:7]


def masked(kind):
    """A small model with zeros."""
    torch.manual_seed(0)
    if kind in ("conv", "chain"):
        net = nn.Sequential(
            nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)
        )
    else:
        net = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32, bias=False))
    pattern = {"nm": gs.NM(1, 4), "blocks": gs.Block(16, 1)}.get(kind.partition(" ")[0])
    density = None if isinstance(pattern, gs.NM) else 0.2
    gs.prune(net, gs.weights.Magnitude(), pattern=pattern, density=density)
    return net.eval()


def packed(kind, net):
    """The same, packed."""
    options = {"large_batches": kind in ("prepared", "blocks", "conv", "chain")}
    options["bits"] = 8 if kind == "int8" else None
    result = gs.PruneResult(net, {}, (), "", "", 0.2, 0.2)
    if kind.startswith("nm") or kind == "blocks":
        names = {"nm": "1:4", "blocks": "block:16x1"}
        pattern = names[kind.partition(" ")[0]]
        records = [gs.LayerRecord(n, (), 0.2, 0.2, pattern=pattern) for n in ("0", "2")]
        result = gs.PruneResult(net, {}, tuple(records), "", pattern, 0.2, 0.2)
    fast = gs.compress(result, latency="rule", **options).model
    if kind == "conv":  # the layers by themselves
        fast.__class__ = nn.Sequential
    if kind == "nm prepared":
        prepare_large_batches(fast)
    if kind == "columns":
        for layer in (fast[0], fast[2]):
            layer.prepare_columns()
    return fast


def pair(kind):
    net = masked(kind)
    return net, packed(kind, copy.deepcopy(net))


def inputs(kind, rows=20):
    torch.manual_seed(rows)
    return torch.randn(3, 8, rows, 7) if kind in ("conv", "chain") else torch.randn(rows, 128)


def near(ours, wanted, kind, rough=False):
    """Equal to float32's rounding, to bfloat16's, or to that of 8-bit integers."""
    bound = 0.02 if kind == "int8" or rough else 1e-5
    scale = float(wanted.detach().float().abs().max())
    assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
    assert float((ours.float() - wanted.float()).abs().max()) <= bound * scale


def test_the_kinds_are_what_they_say():
    kinds = {kind: packed(kind, masked(kind)) for kind in KINDS}
    assert isinstance(kinds["nm"][0], NMLinear) and isinstance(kinds["int8"][0], QuantizedLinear)
    assert isinstance(kinds["conv"][0], PackedConv2d)
    assert (
        "block" in kinds["blocks"][0].batch_kernel and "sell" in kinds["prepared"][0].batch_kernel
    )
    assert kinds["nm prepared"][0].batch_kernel and kinds["columns"][0].columns is not None
    assert kinds["bitmap"][0].batch_kernel is None
    assert type(kinds["chain"]).__name__ == "ConvChain"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_number_of_rows_in_every_mode(kind, mode):
    net, fast = pair(kind)
    for rows in (1, 2, 8, 9, 20, 64, 65):
        x = inputs(kind, rows)
        with mode():
            near(fast(x), net(x), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_a_dense_layer_would(kind, dtype):
    net, fast = pair(kind)
    for rows in (2, 20):
        x = inputs(kind, rows)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            near(fast(x), net(x), kind, rough=True)
            assert fast(x).dtype == dtype
            assert fast[0](x.double()).dtype == torch.float64  # which autocast leaves alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_other_dtypes_give_right_numbers_and_say_that_they_are_slow(kind, change):
    net, fast = pair(kind)
    x = getattr(inputs(kind), change)()
    net, served = getattr(net, change)(), kind == "int8" or change == "bfloat16"
    if served:
        fast = getattr(fast, change)()
    else:
        with pytest.warns(UserWarning, match="unpack their weights at every call"):
            fast = getattr(fast, change)()
    assert fast[0].weight.dtype == x.dtype
    with torch.no_grad():
        near(fast(x), net(x), kind, rough=change != "double")
        near(fast.float()(x.float()), net.float()(x.float()), kind, rough=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_there_for_readers(kind):
    net, fast = pair(kind)
    for name in ("0", "3" if "2" not in dict(fast.named_modules()) else "0"):
        ours, dense = fast.get_submodule(name).weight, net.get_submodule(name).weight
        assert isinstance(ours, torch.Tensor) and not ours.requires_grad
        assert (ours.shape, ours.dtype, ours.device) == (dense.shape, dense.dtype, dense.device)
        assert ours.found is None  # nothing was unpacked so far
        near(ours @ torch.eye(dense.shape[-1]), dense.detach(), kind)
        near(torch.relu(ours), torch.relu(dense.detach()), kind)
        assert ours.numpy().shape == dense.shape
    assert not any("weight" in name for name, _ in fast[0].named_parameters())
    assert "weight" not in fast[0].state_dict()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.zero_(),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: nn.init.ones_(w),
        lambda w: w.requires_grad_(),
        lambda w: setattr(w, "data", torch.zeros(64, 128)),
    ],
)
def test_nobody_writes_into_a_weight_that_is_not_there(write):
    fast = packed("bitmap", masked("bitmap"))
    with torch.no_grad(), pytest.raises(gs.UsageError, match="unpack"):
        write(fast[0].weight)
    assert fast[0].weight.requires_grad_(False) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_inputs_and_biases(kind):
    net, fast = pair(kind)
    x, y = inputs(kind).requires_grad_(), inputs(kind).requires_grad_()
    (net(x) ** 2).sum().backward()
    (fast(y) ** 2).sum().backward()
    near(y.grad, x.grad, kind, rough=kind == "int8")
    near(fast[0].bias.grad, net[0].bias.grad, kind)


@pytest.mark.parametrize("kind", ["prepared", "nm", "conv"])
def test_gradients_of_gradients(kind):
    net, fast = pair(kind)
    found = []
    for model in (net, fast):
        x = inputs(kind, 9).requires_grad_()
        (slope,) = torch.autograd.grad((model(x) ** 2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((slope**2).sum(), x)[0])
    near(found[1], found[0], kind, rough=True)


@pytest.mark.parametrize("kind", KINDS)
def test_function_transforms(kind):
    net, fast = pair(kind)
    x = torch.stack([inputs(kind, 5), inputs(kind, 5) * 2])
    near(torch.vmap(fast)(x), torch.vmap(net)(x), kind)
    one, way = inputs(kind), torch.ones_like(inputs(kind))
    ours, wanted = (torch.func.jvp(model, (one,), (way,))[1] for model in (fast, net))
    near(ours, wanted, kind)
    slopes = [torch.func.grad(lambda z, m=m: m(z).square().sum())(one) for m in (fast, net)]
    near(slopes[0], slopes[1], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    net, fast = pair(kind)
    x = inputs(kind)
    kept = io.BytesIO()
    torch.save(fast, kept)
    kept.seek(0)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    copies.append(torch.load(kept, weights_only=False))
    for other in copies:
        near(other(x), net(x), kind)
        assert (other[0]._form is None) == (fast[0]._form is None)
        if other[0]._form is not None:  # which is that of the copy's own values
            assert other[0].refresh() is other[0]._form[1]


@pytest.mark.parametrize("kind", KINDS)
def test_new_values_count_everywhere(kind):
    if kind == "int8":
        pytest.skip("integers are written by load_state_dict alone")
    net, fast = pair(kind)
    x = inputs(kind)
    with torch.no_grad():
        fast(x)
        fast[0].values.mul_(2)
        net[0].weight.mul_(2)
        near(fast(x), net(x), kind)
    near(fast(x.requires_grad_()), net(x), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_tracers_are_refused_with_the_way_out(kind):
    _, fast = pair(kind)
    with torch.no_grad(), pytest.raises(gs.UsageError, match=r"gossamer\.unpack"):
        torch.jit.trace(fast, (inputs(kind),))
    traced = torch.jit.trace(gs.unpack(fast), (inputs(kind),))
    near(traced(inputs(kind, 9)), fast(inputs(kind, 9)), kind)


@pytest.mark.parametrize("kind", ["prepared", "nm", "int8", "conv"])
def test_other_devices_and_numbers_are_refused(kind):
    _, fast = pair(kind)
    with pytest.raises(gs.UsageError, match="on the CPU only"):
        copy.deepcopy(fast).to("meta")(inputs(kind).to("meta"))
    with pytest.raises(gs.UsageError, match="on the CPU only"):
        fast(inputs(kind).to("meta"))
    with pytest.raises(gs.UsageError, match="floating-point"):
        fast[0](inputs(kind).long())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiles_as_one_graph_for_any_number_of_rows(kind, mode):
    torch._dynamo.reset()
    net, fast = pair(kind)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    for rows in (23, 2, 8, 9, 65):
        with mode():
            near(compiled(inputs(kind, rows)), net(inputs(kind, rows)), kind)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind):
    net, fast = pair(kind)
    rows = torch.export.Dim("rows", min=2, max=200)
    shapes = ({2 if kind in ("conv", "chain") else 0: rows},)
    with torch.no_grad():
        program = torch.export.export(fast, (inputs(kind),), dynamic_shapes=shapes).module()
        for count in (2, 9, 64, 100):
            near(program(inputs(kind, count)), net(inputs(kind, count)), kind)


def test_a_compiled_model_follows_new_values():
    torch._dynamo.reset()
    net, fast = pair("prepared")
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    x = inputs("prepared")
    with torch.no_grad():
        near(compiled(x), net(x), "prepared")
        fast[0].values.mul_(3)
        net[0].weight.mul_(3)
        near(compiled(x), net(x), "prepared")
        state = {name: tensor * 2 for name, tensor in fast.state_dict().items() if "v" in name}
        fast.load_state_dict(state, strict=False)
        for layer in (net[0], net[2]):
            layer.weight.mul_(2)
        near(compiled(x), net(x), "prepared")


@pytest.mark.parametrize("kind", ["bitmap", "prepared", "nm", "int8", "conv"])
def test_compiled_training_of_what_comes_before(kind):
    torch._dynamo.reset()
    net, fast = pair(kind)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    x, y = inputs(kind).requires_grad_(), inputs(kind).requires_grad_()
    net(x).square().sum().backward()
    compiled(y).square().sum().backward()
    near(y.grad, x.grad, kind, rough=kind == "int8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_inductor(kind, mode):
    torch._dynamo.reset()
    net, fast = pair(kind)
    compiled = torch.compile(fast)
    for rows in (2, 9, 20, 64):
        with mode():
            near(compiled(inputs(kind, rows)), net(inputs(kind, rows)), kind)


def test_one_image_and_images_of_other_kinds():
    net, fast = pair("conv")
    x = inputs("conv")
    near(fast[0](x[0]), net[0](x[0]), "conv")
    near(fast[0](x.to(memory_format=torch.channels_last)), net[0](x), "conv")
    assert fast[0](input=x).shape == net[0](input=x).shape


@pytest.mark.parametrize("kind", ["prepared", "nm prepared", "blocks", "conv"])
def test_operators_pass_torch_s_own_check(kind):
    _, fast = pair(kind)
    layer, x = fast[0], inputs(kind, 12).requires_grad_()
    calls = []
    with torch.no_grad():
        program = torch.export.export(nn.Sequential(layer), (x.detach(),))
    operators = {node.target for node in program.graph.nodes if "gossamer" in str(node.target)}
    assert len(operators) == 1
    stamp, form = layer._form
    parts = [t for t in vars(form).values() if isinstance(t, torch.Tensor)]
    if kind == "conv":
        packed = [layer.values, layer.bitmap, layer.row_ptr]
        calls = (x, layer.bias, parts, [16, 72, int(form.tiled)], packed, [3, 3, 1, 1, 1, 1], stamp)
    elif kind == "nm prepared":
        facts = [1, 4, 128]
        calls = (x, layer.bias, parts, [64, 128], [layer.values, layer.codes], facts, stamp)
    else:
        packed = [layer.values, layer.bitmap, layer.row_ptr]
        calls = (x, layer.bias, parts, [64, 128], packed, [128, -1], stamp)
    torch.library.opcheck(operators.pop(), calls)


@pytest.mark.parametrize(
    "pattern, density", [("unstructured", 0.3), ("2:4", None), ("block:16x1", 0.3)]
)
@pytest.mark.parametrize(
    "options", [{"large_batches": False}, {"large_batches": True}, {"bits": 8}, {"bits": 4}]
)
def test_results_may_be_written_into_in_place(pattern, density, options):
    net = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64)).eval()
    gs.prune(net, "magnitude", pattern=pattern, density=density)
    layer = gs.compress(net, latency="rule", **options).model[0]
    for shape in [(), (1,), (6,), (2, 12), (100,)]:
        x = torch.randn(*shape, 128, requires_grad=True)
        wanted = layer(x.detach()) + 1
        y = layer(x)
        y += 1
        y.sum().backward()
        assert torch.equal(y.detach(), wanted) and x.grad is not None
