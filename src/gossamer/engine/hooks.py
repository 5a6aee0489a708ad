"""The only file with hooks. Every context manager here takes its hooks away again, whatever
happens inside, and changes no weight, buffer or flag of the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.engine.calls import Inputs, first_tensor, without_cache
from gossamer.engine.train.optimizers import ASCENTS, Followed

_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
"""The code of torch's function that runs the hooks around a step."""


@contextmanager
def observe_inputs(
    modules: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, call `callback(name, input)` before every forward of each named module."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback(name, first_tensor(args, kwargs, name))

        return hook

    with _pre_hooks([(module, watch(name)) for name, module in modules.items()]):
        yield


@contextmanager
def observe_gradients(
    modules: Mapping[str, nn.Module],
    wanted: Callable[[], bool],
    callback: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    """While open, call `callback(name, input, gradient of the output)` in every backward pass
    through a forward of a named module that ran while `wanted()`."""

    def watch(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if wanted() and output.requires_grad:
                x = first_tensor(args, kwargs, name).detach()
                output.register_hook(lambda gradient: callback(name, x, gradient.detach()))

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def around_steps(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """While open, call `before()` and `after()` around every step that the optimizer takes.

    A step that a GradScaler skips calls neither, and a `step` that calls its base class's counts
    once. The closure of `step(closure)` is called first, so that `before` sees its gradients.
    """

    def pre(
        _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if _is_inner_step(optimizer):
            return args, kwargs
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            before()
            return args, kwargs
        with torch.enable_grad():
            loss = closure()
        before()
        return args[:1], {**kwargs, "closure": _once(loss)}

    def post(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_inner_step(optimizer):
            after()

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook runs for a step that another step of the same optimizer called as its base's.

    torch wraps the `step` of every class that was ever constructed, so that `super().step()` runs
    the hooks again.
    """
    classes = type(optimizer).__mro__
    if sum(getattr(vars(kind).get("step"), "hooked", False) for kind in classes) < 2:
        return False
    frame, running = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            running += 1
        frame = frame.f_back  # type: ignore[assignment]
    return running > 1


@contextmanager
def around_calls(
    thing: Any, method: str, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """While open, call `before()` and `after()` around a method of this one object.

    For wrappers of optimizers, which have no hooks. What others put over it meanwhile stays.
    """
    own, original = method in getattr(thing, "__dict__", {}), getattr(thing, method)
    closed = False

    @wraps(original)  # with the marks that learning rate schedules leave
    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        if closed:
            return original(*args, **kwargs)
        before()
        result = original(*args, **kwargs)
        after()
        return result

    bound = MethodType(call, thing)  # which they want to wrap in their turn
    setattr(thing, method, bound)
    try:
        yield
    finally:
        closed = True
        if getattr(thing, method) is bound:
            if own:
                setattr(thing, method, original)
            else:
                delattr(thing, method)


@contextmanager
def around_ascents(
    followed: Followed, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """While open, call `before()` and `after()` where an optimizer moves weights for one gradient,
    as the first step of sharpness-aware minimisation does."""
    with ExitStack() as calls:
        for holder in (*followed.wrappers, followed.optimizer):
            for name in ASCENTS:
                if callable(getattr(holder, name, None)):
                    calls.enter_context(around_calls(holder, name, before, after))
        yield


@contextmanager
def around_wrappers(
    followed: Followed, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """While open, call `before()` and `after()` around the steps of what wraps the optimizer."""
    with ExitStack() as calls:
        for wrapper in followed.wrappers:
            if hasattr(wrapper, "step"):
                calls.enter_context(around_calls(wrapper, "step", before, after))
        yield


def _once(loss: Any) -> Callable[[], Any]:
    """A closure that returns a loss already computed, and refuses a second call."""
    calls = []

    def closure() -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise UsageError("sparse training cannot follow an optimizer that evaluates its "
                             "closure twice in a step")  # fmt: skip
        return loss

    return closure


@contextmanager
def adjust_outputs(
    adjust: Sequence[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]],
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Iterator[None]:
    """While open, each module returns `function(its input, its output)`; `check` is given its
    keyword arguments and may raise."""

    def watch(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            check(kwargs)
            return function(first_tensor(args, kwargs, type(module).__name__), output)

        return hook

    handles = []
    try:
        for module, function in adjust:
            handles.append(module.register_forward_hook(watch(function), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adjust_attention(
    parts: Sequence[tuple[nn.Module, nn.Module, Callable[[Tensor, Tensor, Tensor | None], Tensor]]],
) -> Iterator[None]:
    """While open, the attention of each (block, attention, function) returns, in the place of its
    output, `function(the block's input, its output, its weights)`."""
    inputs: dict[int, Tensor] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[id(block)] = first_tensor(args, kwargs, type(block).__name__)

    def leave(block: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
            found, weights, *rest = output
            return (function(inputs.pop(id(block)), found, weights), weights, *rest)

        return hook

    handles = [
        attention.register_forward_hook(leave(block, function))
        for block, attention, function in parts
    ]
    try:
        with _pre_hooks([(block, enter) for block, _, _ in parts]):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def substitute(
    forwards: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]],
) -> Iterator[None]:
    """While open, each module computes `function(its input)`; its own hooks go on working.

    Raises UsageError for a module whose forward was replaced already.
    """
    done: list[nn.Module] = []
    try:
        for module, function in forwards:
            if "forward" in vars(module):
                raise UsageError(f"a {type(module).__name__} has a forward that was replaced")
            vars(module)["forward"] = function
            done.append(module)
        yield
    finally:
        for module in done:
            vars(module).pop("forward", None)


@contextmanager
def watch_blocks(
    blocks: Sequence[nn.Module],
    before: Callable[[int, Inputs], None],
    after: Callable[[int, Any], None],
) -> Iterator[None]:
    """While open, call `before(index, inputs)` and `after(index, output)` around every forward of
    each block. Key-value caches among the inputs are replaced by None, so that the block can be run
    again and again on them."""

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(index, without_cache(args, kwargs))

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            after(index, output)

        return hook

    handles = [block.register_forward_hook(leave(i)) for i, block in enumerate(blocks)]
    try:
        with _pre_hooks([(block, enter(index)) for index, block in enumerate(blocks)]):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def around_forward(
    model: nn.Module, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """While open, call `before()` and `after()` around every forward of the model, `after` also
    where the forward raises."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after()

    handle = model.register_forward_hook(leave, always_call=True)
    try:
        with _pre_hooks([(model, enter)]):
            yield
    finally:
        handle.remove()


@contextmanager
def without_padding(
    modules: Sequence[nn.Module], real: Callable[[nn.Module], Tensor | None]
) -> Iterator[set[int]]:
    """While open, mixtures of experts see only the tokens that are real; others come out as zeros.

    real: the mask of the batch that runs, for a module; None where all tokens are real. That is
    exact for real tokens, as experts take each token on its own. Yields the ids of the modules that could be
    served so in their last call: those called with tensors that all have one row a token.
    """
    served: set[int] = set()
    rows: dict[int, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        served.discard(id(module))
        mask = real(module)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
        if mask is None or not tensors or any(len(x) != mask.numel() for x in tensors):
            return None
        served.add(id(module))
        keep = rows[id(module)] = mask.reshape(-1).to(tensors[0].device)

        def cut(x: Any) -> Any:
            return x[keep] if isinstance(x, Tensor) and x.dim() else x

        return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        keep = rows.pop(id(module), None)
        if keep is None or not isinstance(output, Tensor):
            return None
        whole = output.new_zeros(len(keep), *output.shape[1:])
        whole[keep] = output
        return whole

    handles = [module.register_forward_hook(leave) for module in modules]
    try:
        with _pre_hooks([(module, enter) for module in modules]):
            yield served
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's training flag is restored at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _pre_hooks(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in pairs:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
