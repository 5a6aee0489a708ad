"""The optimizer whose `step()` updates the weights, found inside what the user's loop calls.

accelerate, Lightning, Lookahead, SAM and many others wrap a torch optimizer. Hooks belong on the
innermost one that holds the weights: its steps are the ones that happen, whatever the wrapper
skips, repeats or leaves to `first_step` and `second_step`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import UsageError

ASCENTS = ("first_step", "ascent_step", "perturb_weights", "perturb")
"""Methods that move weights away for one gradient, as sharpness-aware minimisation does."""
_DEPTH = 5


@dataclass(frozen=True)
class Followed:
    """The optimizer whose steps are followed, and what lies around it, outermost first.

    parts: those inside it that hold some of its weights and their state, as each rank's does.
    """

    optimizer: torch.optim.Optimizer
    wrappers: tuple[Any, ...] = ()
    parts: tuple[torch.optim.Optimizer, ...] = ()

    @property
    def name(self) -> str:
        """The class that the user constructed."""
        return type((*self.wrappers, self.optimizer)[0]).__name__

    def states(self, weight: Tensor) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """(the state, key, value) of each tensor of the weight's shape that is kept for it."""
        seen: set[int] = set()
        for holder in (self.optimizer, *self.wrappers, *self.parts):
            states = getattr(holder, "state", None)
            if not isinstance(states, Mapping) or weight not in states:
                continue
            state = states[weight]
            if id(state) in seen or not isinstance(state, dict):
                continue
            seen.add(id(state))
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.dim():
                    yield state, key, value


def follow(given: Any, weights: Collection[Tensor]) -> Followed:
    """The innermost torch optimizer in `given` that holds these weights, or those of them that
    anything in `given` holds.

    Raises UsageError where there is none, where several share the weights, and for LBFGS.
    """
    name, paths = type(given).__name__, list(_paths(given, ()))
    real = [path for path in paths if hasattr(path[-1], "_optimizer_step_pre_hooks")]
    if not real:
        raise UsageError(
            f"{name} neither is a torch.optim.Optimizer nor holds one, so its steps cannot be "
            "followed; pass the torch optimizer whose step() updates the weights"
        )
    wanted = {id(weight) for weight in weights}
    held = [wanted & held_by(path[-1]) for path in real]
    every = set().union(*held)
    whole = [path for path, ids in zip(real, held, strict=True) if ids == every]
    if not whole:
        kinds = ", ".join(dict.fromkeys(type(path[-1]).__name__ for path in real))
        raise UsageError(
            f"{name} shares the layers between several optimizers ({kinds}), whose steps cannot be "
            "counted as one; pass the one that holds the layers to mask, and exclude the others'"
        )
    *wrappers, optimizer = max(whole, key=len)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError("LBFGS evaluates the loss many times a step; choose SGD, Adam or the like")
    outer = tuple(x for x in wrappers if not isinstance(x, list | tuple | dict))
    inner = tuple(path[-1] for path in real if any(x is optimizer for x in path[:-1]))
    return Followed(optimizer, outer, inner)


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer updates."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _paths(thing: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Every way from what was given to an optimizer among its attributes, or their items."""
    if len(above) > _DEPTH or any(thing is other for other in above):
        return
    path = (*above, thing)
    inside: Collection[Any] = ()
    if isinstance(thing, list | tuple):
        inside = thing
    elif isinstance(thing, dict):
        inside = thing.values()
    elif not above or _steps(thing):
        yield path
        inside = list(getattr(thing, "__dict__", {}).values())
    for item in inside:
        if _steps(item) or (isinstance(item, list | tuple | dict) and _all_step(item)):
            yield from _paths(item, path)


def _steps(thing: Any) -> bool:
    if isinstance(thing, torch.optim.Optimizer):
        return True
    return not isinstance(thing, type) and hasattr(thing, "param_groups") and hasattr(thing, "step")


def _all_step(items: Any) -> bool:
    values = list(items.values()) if isinstance(items, dict) else list(items)
    return bool(values) and all(_steps(value) for value in values)
