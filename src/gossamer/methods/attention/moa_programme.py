"""The integer programme of MoA: one rule for each head, at a density, for several losses at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import MissingExtra, UsageError

POINTS = 5
"""Values between the best and the worst of each loss, by which it is bounded."""
LEAST = 0.9
"""Of the density that was asked for."""
_SECONDS = 60


@dataclass(frozen=True, eq=False)
class Question:
    """costs (losses, heads of all layers, rules); shares (lengths, rules) of the cache; the bound
    of their means; how many heads a layer has, and how many rules they may have."""

    costs: Tensor
    shares: Tensor
    density: float
    heads: int
    rules: int


def fronts(asked: Question) -> list[Tensor]:
    """Plans of which none is as good as another in every loss and better in one.

    Each is int64 (heads of all layers,): the rule of each head. Every loss is minimised in turn
    while the others are bounded, from the best to the worst that they had.

    Raises UsageError where no plan has the density, and MissingExtra without scipy.
    """
    losses = len(asked.costs)
    best = [_solved(asked, aim, {}) for aim in range(losses)]
    if any(plan is None for plan in best):
        raise UsageError(
            f"MoA: no plan keeps {LEAST * asked.density:.2f} to {asked.density:.2f} of the keys at "
            "every length: allow another density, smaller steps of alpha, smaller blocks or more "
            "rules a layer"
        )
    found = [plan for plan in best if plan is not None]
    values = torch.stack([_losses(asked, plan) for plan in found])  # (plans, losses)
    grid = [torch.linspace(float(x.min()), float(x.max()), POINTS).tolist() for x in values.T]
    for aim in range(losses):
        others = [index for index in range(losses) if index != aim]
        for bounds in product(*(grid[index][1:] for index in others)) if others else ():
            plan = _solved(asked, aim, dict(zip(others, bounds, strict=True)))
            found += [] if plan is None else [plan]
    return _undominated(asked, found)


def _losses(asked: Question, plan: Tensor) -> Tensor:
    """What a plan loses, (losses,)."""
    index = plan.reshape(1, -1, 1).expand(len(asked.costs), -1, 1)
    return asked.costs.gather(2, index).sum((1, 2))


def _undominated(asked: Question, plans: Sequence[Tensor]) -> list[Tensor]:
    unique = list({tuple(plan.tolist()): plan for plan in plans}.values())
    values = torch.stack([_losses(asked, plan) for plan in unique])
    no_worse = (values.unsqueeze(1) <= values).all(-1)  # (by, whom)
    better = (values.unsqueeze(1) < values).any(-1)
    return [plan for plan, beaten in zip(unique, (no_worse & better).any(0), strict=True)
            if not beaten]  # fmt: skip


def _solved(asked: Question, aim: int, bounds: dict[int, float]) -> Tensor | None:
    """The rules that lose least at `aim` below the bounds of the other losses; None without any.

    The unknowns are whether a head has a rule, and whether a layer has it.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise MissingExtra("scipy", "scipy") from None
    count, rules = asked.costs.shape[1:]
    layers = count // asked.heads
    scale = max(float(asked.costs[aim].max()), 1e-30)
    aims = np.concatenate([(asked.costs[aim] / scale).numpy().ravel(), np.zeros(layers * rules)])
    constraints = [
        LinearConstraint(matrix, low, high) for matrix, low, high in _rows(asked, bounds)
    ]
    found = milp(
        aims, integrality=np.ones(len(aims)), bounds=Bounds(0, 1), constraints=constraints,
        options={"time_limit": _SECONDS, "mip_rel_gap": 1e-4},
    )  # fmt: skip
    if found.x is None:
        return None
    chosen = torch.from_numpy(found.x[: count * rules]).reshape(count, rules)
    return chosen.argmax(1)


def _rows(asked: Question, bounds: dict[int, float]) -> list[tuple[Any, Any, Any]]:
    """(matrix, lowest, highest) of every kind of constraint."""
    import numpy as np
    from scipy import sparse

    count, rules = asked.costs.shape[1:]
    layers = count // asked.heads
    each = sparse.kron(sparse.eye(count), np.ones((1, rules)))
    shares = np.tile(asked.shares.numpy() / count, (1, count))
    limited = sparse.kron(sparse.eye(layers), np.ones((1, rules)))
    layer_of = sparse.kron(sparse.eye(layers), np.ones((asked.heads, 1)))
    used = sparse.kron(layer_of, sparse.eye(rules))  # of a head's rule, its layer's

    def wide(own: Any, of_layers: Any) -> Any:
        return sparse.hstack([own, of_layers]).tocsr()

    def padded(own: Any) -> Any:
        return wide(own, sparse.csr_matrix((own.shape[0], layers * rules)))

    slack = 1e-9
    found = [
        (padded(each), 1, 1),
        (padded(sparse.csr_matrix(shares)), LEAST * asked.density - slack, asked.density + slack),
        (wide(sparse.eye(count * rules), -used), -np.inf, 0),
        (wide(sparse.csr_matrix((layers, count * rules)), limited), 0, asked.rules),
    ]
    for index, bound in bounds.items():
        row = asked.costs[index].numpy().reshape(1, -1)
        largest = max(float(row.max()), 1e-30)
        found.append((padded(sparse.csr_matrix(row / largest)), -np.inf, bound / largest + slack))
    return found
