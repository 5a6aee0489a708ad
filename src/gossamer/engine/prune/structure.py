"""Structured zeros into smaller dense networks: which channels hang together, and cutting them out.

The sets come from torch-pruning, which traces the model's autograd graph (DepGraph: Towards Any
Structural Pruning, 2023). It takes every operation that it does not know for an elementwise one, so
each set is tried before it is trusted: its channels are cut, and the outputs must stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.core.coupling import Coupled
from gossamer.core.errors import UsageError
from gossamer.engine.hooks import evaluating
from gossamer.engine.prune.agreement import (
    agrees,
    choose,
    clone,
    fenced,
    largest,
    outputs,
    precise,
    probes,
    tensors,
)
from gossamer.engine.prune.channels import ChannelSet, trace
from gossamer.engine.prune.cutting import Cut, cut, dead, inexact, reader_inputs, silence

_UNSEEN = (
    "tracing found no channels that it writes: it is of another kind, idle or without gradients"
)


@dataclass(frozen=True, eq=False)
class RemoveChannelsResult:
    """The smaller network, and what became of it.

    Attributes
    ----------
    model : nn.Module
        A smaller copy.
    removed : dict of str to int
        Channels cut out, by the name of the first layer that wrote them.
    parameters, flops : tuple of int
        Before and after. FLOPs are those of one forward pass on the example.
    deviation : float
        The largest difference between the outputs of the given and of the smaller network, on the
        example in eval mode.
    left_out : dict of str to str
        Why dead channels stayed, by the same name.
    """

    model: nn.Module
    removed: dict[str, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    deviation: float
    left_out: dict[str, str] = field(default_factory=dict)


def coupled_channels(
    model: nn.Module, example: Tensor, exclude: Sequence[str] = ()
) -> tuple[Coupled, ...]:
    """Find the sets of output channels that can be removed, each with all that must follow.

    It is for convolutional networks and perceptrons. Every set has been tried: on random weights
    and inputs the outputs stay the same when any of its channels is cut rather than ignored by its
    readers. Every other set is left out. `fixed_channels` says which, and why.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example : Tensor
        One batch of inputs.
    exclude : sequence of str
        Names of layers whose channels stay.

    Returns
    -------
    tuple of Coupled
        The sets, as data.

    Raises
    ------
    MissingExtra
        Without torch-pruning.
    UsageError
        For a name that is none, and for a model that cannot be traced.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    >>> gs.coupled_channels(model, torch.randn(2, 16))[0].width
    12
    """
    unknown = sorted(set(exclude) - {name for name, _ in model.named_modules()})
    if unknown:
        raise UsageError(f"exclude {unknown[0]!r} names no layer of the model")
    found = [x.coupled for x in _tried(model, example) if not x.reason]
    return tuple(x for x in found if not set(x.layers) & set(exclude))


def fixed_channels(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Name the layers whose output channels cannot be cut, each with the reason.

    These are all Linear and convolutional layers that are in no set of `coupled_channels`.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example : Tensor
        One batch of inputs.

    Returns
    -------
    dict of str to str
        The reason by the name of the layer.

    Raises
    ------
    MissingExtra
        Without torch-pruning.
    UsageError
        For a model that cannot be traced.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    >>> list(gs.fixed_channels(model, torch.randn(2, 16)))
    ['2']
    """
    found = _tried(model, example)
    free = {name for x in found if not x.reason for name in x.members}
    reasons = {name: x.reason for x in found for name in x.members}
    return {
        name: reasons.get(name) or _UNSEEN
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and name not in free
    }


def remove_channels(
    model: nn.Module,
    example: Tensor,
    coupled: Sequence[Coupled] | None = None,
    approximate: bool = False,
) -> RemoveChannelsResult:
    """Make a smaller copy of the model, without the channels that carry nothing.

    A channel goes when every layer that writes it has only zeros for it, or writes it into a norm
    whose scale is zero. What such a channel still carries, a bias or the shift of a norm, is folded
    into the biases of its readers. That is exact where it is the same at every position and no
    reader pads it with zeros. At least one channel of each set stays.

    The call checks its own work on the example and on random inputs, of other sizes too where the
    model takes them. A set that cannot be cut without changing the outputs is left alone. If
    nothing can be cut, the model comes back as an equal copy.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example : Tensor
        One batch of inputs.
    coupled : sequence of Coupled, optional
        The sets to look at. By default all of them.
    approximate : bool
        Also cut the other dead channels, and fold their mean over the example. `deviation` of the
        result says what that costs.

    Returns
    -------
    RemoveChannelsResult
        The copy, what was removed, and why other dead channels stayed.

    Raises
    ------
    MissingExtra
        Without torch-pruning.
    UsageError
        For a model that cannot be traced, copied or run on the example.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    >>> _ = gs.prune(model, "magnitude", pattern="channel:0", density=0.5, include=["0"])
    >>> smaller = gs.remove_channels(model, torch.randn(2, 16)).model
    >>> [tuple(p.shape) for p in smaller.parameters()]
    [(6, 16), (6,), (4, 6), (4,)]
    """
    traced = trace(model, example)
    found, left_out = _wanted(traced, coupled)
    if coupled is None:
        left_out.update(_unseen(model, traced))
    small = clone(model)
    before, size, flops = _measure(clone(model), example)
    cuts = [Cut(x, dead(x, small)) for x in found]
    cuts = [x for x in cuts if bool(x.gone.any())]
    reference, wide = precise(model, example)
    inputs = probes(reference, wide)
    sets = _independent([x.channels for x in cuts], reference, inputs)
    left_out.update({x.name: x.reason for x in sets if x.reason})
    cuts = [x for x, checked in zip(cuts, sets, strict=True) if not checked.reason]
    cuts = _exact_cuts(cuts, reference, inputs, approximate, left_out)
    if cuts:
        given = reader_inputs(reference, [x.channels for x in cuts], [wide])
        silence(small, cuts, given)
        cut(small, cuts)
    after, new_size, new_flops = _measure(clone(small), example)
    deviation = max(map(largest, before, after), default=0.0)
    removed = {x.channels.name: int(x.gone.sum()) for x in cuts}
    return RemoveChannelsResult(
        small, removed, (size, new_size), (flops, new_flops), deviation, left_out
    )


def _wanted(
    found: Sequence[ChannelSet], coupled: Sequence[Coupled] | None
) -> tuple[list[ChannelSet], dict[str, str]]:
    """The sets to look at, and why one of `coupled` is not among them."""
    if coupled is None:
        return list(found), {}
    missing = {
        x.layers[0]: next(
            (y.reason for y in found if x.layers[0] in y.coupled.layers and y.reason),
            "the model has no such set of channels; call coupled_channels on it again",
        )
        for x in coupled
        if x not in [y.coupled for y in found]
    }
    return [x for x in found if x.coupled in coupled], missing


def _unseen(model: nn.Module, found: Sequence[ChannelSet]) -> dict[str, str]:
    """Layers with dead channels that the trace did not find, with the reason."""
    seen = {name for x in found for name in x.members}
    return {
        name: _UNSEEN
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        and name not in seen
        and not bool(module.weight.detach().flatten(1).any(1).all())
    }


def _tried(model: nn.Module, example: Tensor) -> list[ChannelSet]:
    """Every set of the trace, tried: with a reason unless it can be cut."""
    found = trace(model, example)
    reference, wide = precise(model, example)
    return _independent(found, reference, probes(reference, wide))


def _independent(
    sets: Sequence[ChannelSet], reference: nn.Module, inputs: Sequence[Tensor]
) -> list[ChannelSet]:
    """The same sets, with a reason where cutting channels does more than ignoring them.

    Tried with live channels on disturbed weights, so that it tells of the structure alone: zeros
    in the weights, as in a norm that starts at zero, would hide what it does.
    """
    generator = torch.Generator().manual_seed(0)
    cuts = []
    for x in sets:
        gone = torch.rand(x.coupled.width, generator=generator) < 0.5
        gone[0], gone[-1] = True, False
        if not x.reason and x.coupled.width > 1:
            cuts.append(Cut(x, gone))
    start = clone(reference)
    _disturb(start, generator)
    silence(start, cuts, None)
    _, reasons = choose(cuts, _check(start, outputs(start, inputs), inputs))
    told = {id(x.channels): reason for x, reason in zip(cuts, reasons, strict=True)}
    return [_judged(x, told.get(id(x), "there is one channel only, and it stays")) for x in sets]


def _judged(x: ChannelSet, reason: str) -> ChannelSet:
    """The set with the reason that its trial gave, unless it has one already."""
    return x if x.reason or not reason else replace(x, reason=_explain(reason, x))


def _exact_cuts(
    cuts: Sequence[Cut],
    reference: nn.Module,
    inputs: Sequence[Tensor],
    approximate: bool,
    left_out: dict[str, str],
) -> list[Cut]:
    """What is cut in the end, checked together; reasons for the rest go to `left_out`."""
    given = reader_inputs(reference, [x.channels for x in cuts], inputs)
    rest = []
    for x in cuts:
        stays = inexact(x.channels, reference, given) & x.gone
        gone = x.gone if approximate else x.gone & ~stays
        if bool(gone.all()):
            gone = gone.clone()
            gone[0] = False
        if not approximate and bool(stays.any()):
            left_out[x.channels.name] = (
                f"{int(stays.sum())} dead channels carry what no bias replaces exactly, such as a "
                "constant that a reader pads with zeros; approximate=True folds their mean"
            )
        if bool(gone.any()):
            rest.append(Cut(x.channels, gone))
    start = clone(reference)
    if approximate:
        silence(start, rest, given)
    fold = None if approximate else given
    check = _check(start, outputs(start, inputs), inputs, lambda net, x: silence(net, x, fold))
    chosen, reasons = choose(rest, check)
    for x, reason in zip(rest, reasons, strict=True):
        if reason:
            left_out[x.channels.name] = _explain(reason, x.channels)
    return chosen


def _check(
    start: nn.Module,
    given: list[list[Tensor]],
    inputs: Sequence[Tensor],
    before: Callable[[nn.Module, Sequence[Cut]], None] = lambda net, cuts: None,
) -> Callable[[Sequence[Cut]], str]:
    """How a copy of `start` without these channels differs from what is given."""

    def check(cuts: Sequence[Cut]) -> str:
        net = clone(start)
        before(net, cuts)
        cut(net, cuts)
        return agrees(given, net, inputs)

    return check


def _explain(reason: str, x: ChannelSet) -> str:
    return f"{reason}; on their way: {', '.join(x.passes)}" if x.passes else reason


@torch.no_grad()
def _disturb(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every parameter, of the size of a usual initialisation, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            fan = parameter.numel() // parameter.shape[0] if parameter.dim() > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise / fan**0.5).to(parameter))


def _measure(model: nn.Module, example: Tensor) -> tuple[list[Tensor], int, int]:
    """Outputs, number of parameters, flops of one forward pass in eval mode."""
    with evaluating(model), fenced(example.device), FlopCounterMode(display=False) as counter:
        torch.manual_seed(0)
        output = list(tensors(model(example.clone())))
    if not output:
        raise UsageError("the model returns no tensor; wrap it so that it does")
    return output, sum(p.numel() for p in model.parameters()), counter.get_total_flops()
