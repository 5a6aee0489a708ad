"""Checks that methods of activations share."""

from __future__ import annotations

from gossamer.core.density import check_density
from gossamer.core.errors import UsageError


def check_options(name: str, density: float, allocation: str, step: float) -> None:
    """Raise UsageError for a density, an allocation or a step that cannot be."""
    try:
        check_density(density)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    if allocation not in ("greedy", "uniform"):
        raise UsageError(f"{name}: allocation is 'greedy' or 'uniform', not {allocation!r}")
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step <= 1:
        raise UsageError(f"{name}: step is a sparsity in (0, 1], not {step!r}")
