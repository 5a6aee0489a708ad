"""Linear layers that multiply only some inputs, for as long as a block is open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import unwrap
from gossamer.engine.data import Batch, read_batches
from gossamer.engine.hooks import substitute
from gossamer.engine.inputs.activations.break_even import stay_dense
from gossamer.engine.inputs.activations.calibrate import calibrate_activations, with_density
from gossamer.engine.inputs.activations.layer_plan import turned
from gossamer.engine.inputs.activations.loss import loss_of
from gossamer.engine.inputs.activations.neurons import NeuronRun, select_neurons
from gossamer.engine.inputs.activations.plan import ActivationPlan
from gossamer.engine.inputs.activations.protocols import NeuronSelector
from gossamer.engine.inputs.activations.result import ActivationResult, Served, told
from gossamer.nn.active import ActiveProduct, Rotation
from gossamer.ops.active import Neurons


class ActivationRun:
    """What a block of `sparsify_activations` yields; `result` tells what has happened so far.

    Attributes
    ----------
    plan : ActivationPlan
        What calibration found; `plan.save(path)` keeps it.
    """

    def __init__(self, plan: ActivationPlan, served: dict[str, Served], held: int) -> None:
        self.plan, self._served, self._held = plan, served, held
        self.loss: tuple[float, float] | None = plan.loss

    @property
    def result(self) -> ActivationResult:
        """The figures of all calls so far."""
        return told(self.plan, self._served, self._held, self.loss)

    @property
    def products(self) -> dict[str, ActiveProduct]:
        """What serves each layer that chooses its inputs, by name."""
        return {n: x.product for n, x in self._served.items() if x.product is not None}

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While open, every call keeps every input."""
        for product in self.products.values():
            product.paused = True
        try:
            yield
        finally:
            for product in self.products.values():
                product.paused = False

    def reset(self) -> None:
        """Begin to count anew."""
        for product in self.products.values():
            product.counts = type(product.counts)()


@contextmanager
def sparsify_activations(
    model: nn.Module,
    method: Any,
    data: Iterable[Batch] | None = None,
    *,
    density: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    prefill: Literal["dense", "sparse"] = "dense",
    simulate: bool = False,
    break_even: float | None = None,
    loss: bool = True,
    progress: bool = False,
) -> Iterator[ActivationRun | NeuronRun]:
    """See `gossamer.sparsify_activations`, which also takes a method by its name."""
    model = unwrap(model)
    check_options(prefill, break_even)
    if isinstance(method, NeuronSelector) and not isinstance(method, type):
        check_no_data(method, data, include, exclude, prefill, simulate)
        with select_neurons(model, with_density(method, density)) as neurons:
            yield neurons
        return
    batches = None if data is None else read_batches(data)
    if isinstance(method, ActivationPlan):
        plan = method
        check_plan(plan, density, include, exclude)
    else:
        plan = calibrate_activations(
            model, method, batches, density=density, include=include, exclude=exclude,
            progress=progress,
        )  # fmt: skip
    layers = planned_layers(model, plan)
    if not simulate:
        for name, layer in layers.items():
            check_kernel(name, layer)
    whys = {} if simulate else stay_dense(plan.layers, layers, break_even)
    dense_loss = loss_of(model, batches) if loss and batches is not None else None
    with ExitStack() as stack:
        served = _serve(plan, layers, whys, simulate, prefill == "sparse", stack)
        products = {name: part.product for name, part in served.items()}
        stack.enter_context(
            substitute([(layers[n], p) for n, p in products.items() if p is not None])
        )
        run = ActivationRun(plan, served, _held(plan, layers, products))
        if dense_loss is not None and batches is not None:
            run.loss = dense_loss, _masked_loss(model, batches, run)
        yield run
    run.result.check_reached() if run.products else None


def check_options(prefill: str, break_even: float | None) -> None:
    """Raise UsageError for what cannot be right, before anything changes."""
    if prefill not in ("dense", "sparse"):
        raise UsageError(f"prefill is 'dense' or 'sparse', not {prefill!r}")
    if break_even is not None and not break_even >= 0:
        raise UsageError(f"break_even is a density from 0, not {break_even!r}")


def check_no_data(
    method: NeuronSelector,
    data: Any,
    include: Sequence[str],
    exclude: Sequence[str],
    prefill: str,
    simulate: bool,
) -> None:
    """Raise UsageError for options that mean nothing where each prompt chooses neurons."""
    if data is not None or include or exclude or prefill != "dense" or simulate:
        raise UsageError(
            f"{method.card.name} chooses neurons from each prompt, which it reads densely: it takes "
            "density alone, and its own options"
        )


def check_plan(
    plan: ActivationPlan, density: float | None, include: Sequence[str], exclude: Sequence[str]
) -> None:
    """Raise UsageError for options that a plan has settled."""
    if density is not None or include or exclude:
        raise UsageError(
            "a plan has its densities and layers: density, include and exclude belong to "
            "gs.calibrate_activations"
        )


def planned_layers(model: nn.Module, plan: ActivationPlan) -> dict[str, nn.Linear]:
    """The layers that a plan names; raises UsageError for a plan of another model."""
    modules = dict(model.named_modules())
    found = ((name, modules.get(name)) for name in plan.layers)
    layers = {name: layer for name, layer in found if isinstance(layer, nn.Linear)}
    plan.check_model({name: layer.weight for name, layer in layers.items()})
    return layers


def check_kernel(name: str, layer: nn.Linear) -> None:
    """Raise UsageError where no kernel reads a layer's weight."""
    weight = layer.weight
    if weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16):
        return
    raise UsageError(
        f"{name}: the kernel reads float32 and bfloat16 on the CPU, not {weight.dtype} on "
        f"{weight.device.type}; simulate=True multiplies masks anywhere, and saves no time"
    )


def _serve(
    plan: ActivationPlan,
    layers: Mapping[str, nn.Linear],
    whys: Mapping[str, str],
    simulate: bool,
    prompts: bool,
    stack: ExitStack,
) -> dict[str, Served]:
    """A product for every layer that chooses; the columns of each lie in its own parameter."""
    rotations: dict[int, Rotation] = {}
    found = {}
    for name, layer in layers.items():
        each, width = plan.layers[name], layer.weight.element_size()
        if each.state.density >= 1 or name in whys:
            found[name] = Served(None, whys.get(name, "dense: keeps every input"), width)
            continue
        rotation = None
        if each.rotation is not None:
            rotation = rotations.setdefault(id(each.rotation), Rotation(each.rotation))
        columns = _columns(layer, each.rotation, simulate, stack)
        bias = None if layer.bias is None else layer.bias if simulate else layer.bias.detach()
        product = ActiveProduct(columns, each.state, each.budget, bias, rotation, prompts)
        found[name] = Served(product, "masked" if simulate else "columns", width)
    stack.callback(_release, [x.product for x in found.values() if x.product is not None])
    return found


def _release(products: Sequence[ActiveProduct]) -> None:
    """Let go of the columns before weights are put back, since the run outlives its block."""
    for product in products:
        product.columns = torch.empty(product.out_features, product.width, device="meta")


def _columns(
    layer: nn.Linear, rotation: Tensor | None, simulate: bool, stack: ExitStack
) -> Neurons | Tensor:
    if rotation is not None:  # W V stands beside W, which must come back bit for bit
        weight = turned(layer.weight.detach(), rotation)
        return weight if simulate else Neurons(weight.t().contiguous())
    if simulate:
        return layer.weight
    stack.enter_context(_transposed(layer))
    return Neurons(layer.weight.detach().t())


@contextmanager
def _transposed(layer: nn.Linear) -> Iterator[None]:
    """While open, the weight lies column by column in memory; its shape and numbers stay."""
    parameter = layer.weight
    parameter.data = parameter.data.t().contiguous().t()
    try:
        yield
    finally:
        parameter.data = parameter.data.contiguous()


def _held(
    plan: ActivationPlan,
    layers: Mapping[str, nn.Linear],
    products: Mapping[str, ActiveProduct | None],
) -> int:
    """Bytes in memory beside the model: turned weights, rotations, norms, low-rank parts."""
    total, rotations = 0, {}
    for name, product in products.items():
        if product is None:
            continue
        state = product.state
        total += 0 if state.scale is None else state.scale.nbytes
        total += sum(part.nbytes for part in state.bypass or ())
        if product.rotation is not None:
            total += layers[name].weight.nbytes
            rotations[id(product.rotation)] = product.rotation.matrix.nbytes
    return total + sum(rotations.values())


def _masked_loss(model: nn.Module, batches: Sequence[Batch], run: ActivationRun) -> float:
    """The loss of the data when every token chooses its inputs, prompts too."""
    before = {name: product.prompts for name, product in run.products.items()}
    for product in run.products.values():
        product.prompts = True
    found = loss_of(model, batches)
    for name, product in run.products.items():
        product.prompts = before[name]
    run.reset()
    assert found is not None
    return found
