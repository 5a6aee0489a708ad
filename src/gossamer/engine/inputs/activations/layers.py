"""Which linear layers of a model may skip inputs, and which of them share their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.matrix import why_not_plain
from gossamer.engine.hooks import evaluating, observe_inputs
from gossamer.engine.inputs.activations.plan import Chosen
from gossamer.models.layers import choose_weights
from gossamer.nn.packed.base import PackedLayer


def choose_linears(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Chosen:
    """The plain linear layers, but for heads, routers, adapters and tied ones.

    Raises UsageError where none is left, and for patterns that match nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            raise UsageError(
                f"{name} is packed: choose inputs of the ordinary model, and then pack it with "
                "gs.compress(model, activations=plan)"
            )
    choice = choose_weights(model, include, exclude)
    layers: dict[str, nn.Linear] = {}
    left = dict(choice.left)
    for name, weight in choice.weights.items():
        reason = _refusal(weight.module) if weight.plain else "not the whole weight of one layer"
        if reason is None and isinstance(weight.module, nn.Linear):
            layers[name] = weight.module
        else:
            left[name] = reason or "not a Linear"
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no linear layer whose inputs can be skipped: "
            + "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        )
    return Chosen(layers, left, {name: choice.blocks[name] for name in layers})


def _refusal(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__}, whose inputs are not skipped"
    return why_not_plain(module)


def sharing(
    model: nn.Module, layers: dict[str, nn.Linear], run: Callable[[], object]
) -> list[list[str]]:
    """Layers that are called with one and the same tensor, in the order of calls.

    run: calls the model once. Raises UsageError for layers that it never calls.
    """
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def saw(name: str, x: Tensor) -> None:
        if last and last[0] is x:
            groups[-1].append(name)
        else:
            groups.append([name])
            last[:] = [x]

    with evaluating(model), observe_inputs(layers, saw):
        run()
    called = [name for group in groups for name in group]
    if set(called) != set(layers) or len(called) != len(layers):
        missing = sorted(set(layers) - set(called))
        what = f"{missing[0]} was not called" if missing else "a layer was called twice"
        raise UsageError(
            f"{what} in one run of the model, so its inputs cannot be calibrated; leave such "
            "layers out with exclude="
        )
    return groups
