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
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.engine.hooks import around_ascents, around_steps, around_wrappers
from gossamer.engine.protocols import TopologyMethod
from gossamer.engine.train.run import SparseRun


@contextmanager
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
) -> Iterator[SparseRun]:
    """Train under masks; the weights follow the method's support after every `optimizer.step()`.

    The block holds the training loop as it was. After it the model holds its sparse weights, and
    nothing else of ours. Optimizer state is reset where it is shaped as the weight (SGD, Adam and
    kin, but not Adafactor's factored moments).

    To clip gradients, call `sparsity.mask_gradients()` first, so that the norm is that of the kept
    weights. Under a GradScaler call it after `unscale_`. An average of the weights over supports
    that move is denser than the model: call `sparsity.apply_to(averaged)` before it is used.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    optimizer : torch.optim.Optimizer
        Or what wraps one: accelerate's, Lookahead, SAM with `first_step` and `second_step`, whose
        both gradients are then those of the sparse network. The steps of the inner optimizer count.
    method : TopologyMethod
        What chooses the support, such as `gs.weights.RigL(density=0.1)`.
    total_steps : int
        Optimizer steps of the whole run, for the schedules.
    include, exclude : sequence of str
        As in `prune`. Layers that are frozen are left alone.
    loss : callable, optional
        Computes the loss of one batch, for a method that looks at gradients before training (SNIP).
    seed : int
        Of what the method draws.
    state : mapping, optional
        An earlier `state_dict()` to continue from.
    group : process group, optional
        The ranks that train the model together, where neither DDP nor FSDP2 says so.

    Yields
    ------
    SparseRun
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
    """
    run = SparseRun(model, optimizer, method, total_steps, include, exclude, seed, group)
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
