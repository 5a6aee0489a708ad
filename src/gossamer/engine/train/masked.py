"""Sparse training: one loop for every method that chooses weights while the model trains.

Masks are data beside the model, not parametrizations: the parameter itself holds the masked
weights between steps. So every forward (eager, compiled, under autocast, in another library's
code) sees exact zeros without a wrapped module or a renamed parameter, checkpoints keep their
names, and `weight.grad` already is the dense gradient that growth needs, at no extra pass.
What must happen around a step hangs on the optimizer's own step hooks rather than on a call that
each loop must remember: gradient accumulation, a GradScaler that skips a step and other libraries
then do the right thing unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.engine.hooks import around_ascents, around_steps, around_wrappers
from gossamer.engine.protocols import LearnedMask, TopologyMethod
from gossamer.engine.train.learned import LearnedRun
from gossamer.engine.train.run import SparseRun


@overload
def sparse_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: TopologyMethod,
    *,
    total_steps: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    loss: Callable[[], Tensor] | None = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    group: Any = None,
) -> AbstractContextManager[SparseRun]: ...


@overload
def sparse_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: LearnedMask,
    *,
    total_steps: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
) -> AbstractContextManager[LearnedRun]: ...


def sparse_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: TopologyMethod | LearnedMask,
    *,
    total_steps: int,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    loss: Callable[[], Tensor] | None = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    group: Any = None,
) -> AbstractContextManager[Any]:
    """Train under masks; the weights follow the method's support after every `optimizer.step()`.

    The block holds the training loop as it was. After it the model holds its sparse weights, and
    nothing else of ours. Optimizer state is reset where it is shaped as the weight (SGD, Adam and
    kin, but not Adafactor's factored moments).

    To clip gradients, call `sparsity.mask_gradients()` first, so that the norm is that of the kept
    weights. Under a GradScaler call it after `unscale_`. An average of the weights over supports
    that move is denser than the model: call `sparsity.apply_to(averaged)` before it is used.

    A method that learns masks puts a module between each weight and its layer. The parameters of
    these modules join the optimizer as a group with the method's own `rate` and no decay. They leave
    it at the end. Make learning rate schedules inside the block. To continue a run, load the states
    of model and optimizer there. Where the block ends by an error, the dense weights stay.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    optimizer : torch.optim.Optimizer
        Or what wraps one: accelerate's, Lookahead, SAM with `first_step` and `second_step`, whose
        both gradients are then those of the sparse network. The steps of the inner optimizer count.
    method : TopologyMethod or LearnedMask
        What chooses the support, such as `gs.weights.RigL(density=0.1)`, or learns masks, such as
        `gs.weights.MaskLLM()`.
    total_steps : int
        Optimizer steps of the whole run, for the schedules.
    include, exclude : sequence of str
        As in `prune`. Layers that are frozen are left alone.
    loss : callable, optional
        Computes the loss of one batch by a call of the model, for a method that looks at it before
        training: SNIP, GraSP, and SynFlow, which takes no more than the shape of the inputs.
    seed : int
        Of what the method draws.
    state : mapping, optional
        An earlier `state_dict()` to continue from.
    group : process group, optional
        The ranks that train the model together, where neither DDP nor FSDP2 says so.

    Yields
    ------
    SparseRun or LearnedRun
        The supports, their density, and the state to save.

    Raises
    ------
    UsageError
        For a density that empties a layer, a pattern that does not divide, and a weight that is
        recomputed at every forward. For an optimizer that holds other parameters than the model's,
        a missing gradient, and weights that changed outside the support or with no step seen.
    NonFiniteError
        Before a step with NaN or infinite gradients. Both are raised before steps on all ranks or
        none.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Linear(64, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> method = gs.weights.RigL(density=0.1)
    >>> with gs.sparse_training(model, optimizer, method, total_steps=20) as sparsity:
    ...     for _ in range(20):
    ...         model(torch.randn(16, 64)).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> int(model.weight.count_nonzero())
    64
    """
    if isinstance(method, LearnedMask) and not isinstance(method, type):
        if loss is not None or group is not None:
            raise UsageError("learned masks take neither loss= nor group=; leave them out")
        given = (model, optimizer, method, total_steps, include, exclude, seed)
        return _learning(partial(LearnedRun, *given), state)
    chosen = cast(TopologyMethod, method)
    wanted = (model, optimizer, chosen, total_steps, include, exclude, seed, group)
    return _rewiring(partial(SparseRun, *wanted), loss, state)


@contextmanager
def _rewiring(
    make: Callable[[], SparseRun],
    loss: Callable[[], Tensor] | None,
    state: Mapping[str, Any] | None,
) -> Iterator[SparseRun]:
    """A run of a topology method, with what must happen around steps.

    It is made when the block is entered: a forward before may change where parameters lie.
    """
    run = make()
    with (
        around_steps(run.optimizer, run.before_step, run.after_step),
        around_ascents(run.followed, run.before_ascent, run.after_ascent),
        around_wrappers(run.followed, run.before_wrapper, run.after_wrapper),
    ):
        if state is None:
            run.start(loss)
        else:
            run.load_state_dict(state)
        yield run
        run.check()


@contextmanager
def _learning(
    make: Callable[[], LearnedRun], state: Mapping[str, Any] | None
) -> Iterator[LearnedRun]:
    """A run of learned masks; they go at the end, whatever happens inside."""
    run = make()
    try:
        run.start()
        if state is not None:
            run.load_state_dict(state)
        with around_steps(run.optimizer, run.before_step, run.after_step):
            yield run
    except BaseException:
        run.close()
        raise
    run.finish()
