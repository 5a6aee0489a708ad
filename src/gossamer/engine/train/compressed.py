"""Sparse training where only kept weights exist: no dense weight, gradient, mask or state.

The masked loop (`sparse_training`) shows what a method does; this one also costs what it keeps.
Layers hold their kept weights as one parameter, so any optimizer's state follows them, and a
method that grows by gradient sees the dense gradient of a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.allocation import LayerInfo
from gossamer.core.budget import TopK
from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.matrix import why_not_plain
from gossamer.engine.hooks import around_ascents, around_steps, observe_gradients
from gossamer.engine.protocols import CompressedTopology, StartsNewcomers
from gossamer.engine.train.distributed import unwrapped
from gossamer.engine.train.guard import (
    all_finite,
    check_state,
    check_total,
    check_unmoved,
    fingerprint,
    thawed,
)
from gossamer.engine.train.layers import own_parameter
from gossamer.engine.train.optimizers import follow, held_by
from gossamer.models.layers import prunable_layers
from gossamer.nn.sparse import SparseConv2d, SparseLayer, SparseLinear, carry, random_positions
from gossamer.ops.select import keep

VERSION = 1
_BLOCK = 1 << 18
"""So many numbers of a dense gradient exist at a time: 1 MB."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def sparse_layers(
    model: nn.Module,
    method: CompressedTopology,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Replace Linear and 1x1 Conv2d layers, in place, by layers that hold random kept weights.

    Counts come from the method's allocation. Kept weights and biases keep their values. Construct
    the optimizer afterwards.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    method : CompressedTopology
        A method that needs no dense weights, such as `gs.weights.RigL(density=0.05)`.
    include, exclude : sequence of str
        As in `prune`.
    seed : int
        Of the random supports.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    UsageError
        For a method that needs dense weights, a convolution of another kind, and a layer that does
        more than its class: a weight recomputed at every forward, a forward of its own, hooks.
        Nothing is changed then.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
    >>> _ = gs.sparse_layers(model, gs.weights.RigL(density=0.1))
    >>> sum(p.numel() for p in model.parameters())  # 205 weights and 32 biases
    237
    """
    _check_method(method)
    inner, _ = unwrapped(model)
    chosen = prunable_layers(inner, include, exclude)
    infos = []
    for name, (module, block) in chosen.items():
        weight = own_parameter(name, module)
        _check_plain(inner, name, module)
        if not isinstance(module, nn.Linear) and tuple(weight.shape[2:]) != (1, 1):
            raise UsageError(f"{name}: only Linear and 1x1 Conv2d train sparsely; exclude it")
        shape = tuple(weight.shape)
        infos.append(LayerInfo(name, shape, block, torch.empty(shape, device="meta").flatten(1)))
    counts = method.counts(infos)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, SparseLayer] = {}
    for info in infos:
        positions = random_positions(counts[info.name], info.size, generator)
        module = chosen[info.name][0]
        if isinstance(module, nn.Conv2d):
            made[info.name] = SparseConv2d.from_conv(module, positions)
        elif isinstance(module, nn.Linear):
            made[info.name] = SparseLinear.from_linear(module, positions)
    for name, layer in made.items():
        inner.set_submodule(name, layer)
    return model


@contextmanager
def true_sparse_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: CompressedTopology,
    *,
    total_steps: int,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
) -> Iterator[TrueSparseRun]:
    """Train in the memory and time of the kept weights; the method rewires the sparse layers.

    The block holds the training loop as it was, with `optimizer.step()`. The model holds
    SparseLinear or SparseConv2d layers, whose values the optimizer holds. A GradScaler skips steps
    that are not seen here, so use none: autocast to bfloat16 needs none.

    Parameters
    ----------
    model : nn.Module
        With layers that `sparse_layers` or the user put there.
    optimizer : torch.optim.Optimizer
        As in `sparse_training`.
    method : CompressedTopology
        StaticRandom, SET or RigL.
    total_steps : int
        Optimizer steps of the whole run, for the schedules.
    seed : int
        Of what the method draws.
    state : mapping, optional
        An earlier `state_dict()` to continue from, beside the model's and the optimizer's own.

    Yields
    ------
    TrueSparseRun
        The sparse layers, their density, and the state to save.

    Raises
    ------
    UsageError
        For a model without such layers, a method that needs dense weights, a missing gradient, and
        for weights that changed while no step was seen.
    NonFiniteError
        Before a step with NaN or infinite gradients is taken.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> method = gs.weights.SET(density=0.1)
    >>> model = gs.sparse_layers(torch.nn.Sequential(torch.nn.Linear(64, 32)), method)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> with gs.true_sparse_training(model, optimizer, method, total_steps=10) as run:
    ...     for _ in range(10):
    ...         model(torch.randn(16, 64)).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    run = TrueSparseRun(model, optimizer, method, total_steps, seed)
    if state is not None:
        run.load_state_dict(state)
    with (
        around_steps(run.optimizer, run.before_step, run.after_step),
        around_ascents(run.followed, run.forget, run.forget),
        observe_gradients(run.layers, run.wants_gradients, run.see),
    ):
        yield run
        run.check()


class TrueSparseRun:
    """The sparse layers of one training run and when they are rewired."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: CompressedTopology,
        total_steps: int,
        seed: int = 0,
    ) -> None:
        _check_method(method)
        check_total(total_steps)
        self.method, self.total_steps = method, total_steps
        self._by_gradient = "gradients" in method.card.needs
        model, _ = unwrapped(model)
        every = {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}
        self.layers = {n: m for n, m in every.items() if m.values.requires_grad}
        self._frozen = {n: m for n, m in every.items() if n not in self.layers}
        if not self.layers:
            raise UsageError("the model has no sparse layer to train; see sparse_layers")
        self.followed = follow(optimizer, [x.values for x in self.layers.values()])
        self.optimizer = self.followed.optimizer
        held = held_by(self.optimizer)
        for name, layer in self.layers.items():
            if id(layer.values) not in held:
                raise UsageError(f"{name}: its values are not in the optimizer")
        self.step = 0
        self.changed = 0
        """Weights that the last update dropped or grew."""
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._begin()

    @property
    def density(self) -> float:
        """The share of kept weights over the sparse layers."""
        kept = sum(layer.values.numel() for layer in self.layers.values())
        return kept / sum(x.shape[0] * x.shape[1] for x in self.layers.values())

    def check(self) -> None:
        """Raise UsageError where weights changed and no step was seen."""
        if self.step == self._begun:
            weights = [x.values for x in self.layers.values()]
            check_unmoved(weights, self._first, self.followed.name)

    def forget(self) -> None:
        """Drop what was seen of a gradient that no step follows, as before a second one of SAM."""
        self._seen = {}

    def wants_gradients(self) -> bool:
        """Whether the next step's update grows by gradient."""
        return self._by_gradient and self._due(self.step + 1)

    def see(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """One backward pass through a layer: its input, and the gradient of its output."""
        layer = self.layers[name]
        pair = layer.as_rows(x.to(layer.values.dtype), gradient.to(layer.values.dtype))
        self._seen.setdefault(name, []).append(pair)

    def before_step(self) -> None:
        """Check the gradients, and that frozen layers still are."""
        for name, layer in self._frozen.items():
            if layer.values.requires_grad:
                raise thawed(name)
        for name, layer in self.layers.items():
            if self.wants_gradients() and name not in self._seen:
                raise UsageError(
                    f"{name}: has no gradient, and {self.method.card.name} grows weights by it in "
                    "this step; call backward() on a loss that was not computed under no_grad"
                )
            gradient = layer.values.grad
            if gradient is not None and not all_finite(gradient):
                self._seen = {}
                raise NonFiniteError(
                    f"{name}: its gradient holds NaN or infinity; the step is not taken"
                )

    def after_step(self) -> None:
        """Count the step, then rewire where it is time."""
        self.step += 1
        seen, self._seen = self._seen, {}
        if not self._due(self.step):
            return
        self.changed = 0
        for name, layer in self.layers.items():
            self._rewire(layer, seen.get(name, []))

    def state_dict(self) -> dict[str, Any]:
        """What the run needs to continue bit for bit, beside the model and the optimizer; checked
        as by `check`."""
        self.check()
        return {
            "version": VERSION,
            "method": repr(self.method),
            "total_steps": self.total_steps,
            "step": self.step,
            "changed": self.changed,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises FormatError, nothing changed, if it does not fit."""
        mine = {"version": VERSION, "method": repr(self.method), "total_steps": self.total_steps}
        check_state(state, mine, {})
        self._generator.set_state(state["generator"])
        self.step, self.changed = int(state["step"]), int(state["changed"])
        self._begin()

    def _begin(self) -> None:
        self._begun = self.step
        self._first = fingerprint([x.values for x in self.layers.values()])

    def _due(self, step: int) -> bool:
        return step <= self.total_steps and self.method.due(step, self.total_steps)

    @torch.no_grad()
    def _rewire(self, layer: SparseLayer, seen: Sequence[tuple[Tensor, Tensor]]) -> None:
        values, old = layer.values, layer.positions
        size = layer.shape[0] * layer.shape[1]
        stay = self.method.survivors(values, self.step, self.total_steps)
        kept, room = old[stay], int((~stay).sum())
        if self._by_gradient:
            grown, carried = largest_gradients(seen, layer.shape, room, kept), None
        else:
            free = min(room, size - old.numel())
            grown, carried = random_positions(free, size, self._generator, old), stay
            if free < room:
                dropped = old[~stay]
                some = torch.randperm(room, generator=self._generator)[: room - free]
                grown = torch.cat([grown, dropped[some]])
        states = list(self.followed.states(values))
        origin = layer.rewire(torch.cat([kept, grown]).sort().values, carried)
        for state, key, value in states:
            state[key] = carry(value, origin)
        new = origin < 0
        if isinstance(self.method, StartsNewcomers):
            drawn = self.method.newcomers(int(new.sum()), self._generator)
            layer.values[new] = drawn.to(layer.values)
        self.changed += 2 * int(new.sum())


def largest_gradients(
    seen: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int], count: int, kept: Tensor
) -> Tensor:
    """int64 (count,): where the dense gradient is largest in size, other than at `kept`; unordered.

    seen: pairs (rows, in) and (rows, out) whose products dy^T x the gradient is the sum of. Some
    rows of it exist at a time, and of those what is among the best so far; ties go to the lower
    position. O(rows * in * out).
    """
    pool, found = torch.empty(0), torch.empty(0, dtype=torch.int64)
    least = torch.tensor(-0.5)
    step = max(1, _BLOCK // max(1, shape[1]))
    for first in range(0, shape[0] if count else 0, step):
        last = min(shape[0], first + step)
        block = sum(dy[:, first:last].t() @ x for x, dy in seen)
        assert isinstance(block, Tensor)
        sizes = block.abs_().reshape(-1)
        low, high = torch.searchsorted(kept, torch.tensor([first, last]) * shape[1]).tolist()
        sizes[kept[low:high] - first * shape[1]] = -1
        near = (sizes > least).nonzero().reshape(-1)
        pool, found = torch.cat([pool, sizes[near]]), torch.cat([found, near + first * shape[1]])
        if pool.numel() > 2 * count or last == shape[0]:
            chosen = keep(pool, TopK(count))
            pool, found = pool[chosen], found[chosen]
            least = pool.min() if pool.numel() == count else least  # what a later one must beat
    return found


def _check_method(method: Any) -> None:
    if isinstance(method, type) or not isinstance(method, CompressedTopology):
        raise UsageError(
            f"{method!r} cannot train where only kept weights exist; StaticRandom, SET and RigL can"
        )


def _check_plain(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise UsageError for a layer whose work a sparse one would not do."""
    if reason := why_not_plain(module):
        raise UsageError(f"{name}: {reason}; exclude it, a sparse layer would do the plain product")
    if any(getattr(module, x) for x in _HOOKS):
        raise UsageError(
            f"{name}: hooks hang on it, which would be lost; remove them and add them to the "
            "sparse layer, or exclude it"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise UsageError(
            f"{name}: {type(parent).__name__} reads its weight, which a sparse layer does not "
            "have; exclude it"
        )
