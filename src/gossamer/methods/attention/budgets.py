"""How many keys a method of caches may keep or read."""

from __future__ import annotations

from gossamer.core.errors import UsageError
from gossamer.methods.attention.tiles import check_count, check_share


def check_budget(method: str, tokens: int, density: float | None, least: int, what: str) -> None:
    """Raise UsageError unless the budget is valid and holds what is always kept."""
    check_count(method, "tokens", tokens)
    if density is not None:
        check_share(method, "density", density)
    elif tokens < least:
        raise UsageError(f"{method}: tokens={tokens} is below {least}, {what}")


def budget_of(tokens: int, density: float | None, length: int, least: int) -> int:
    """Keys of a text; the least even where a small share of a short text is fewer."""
    if density is not None:
        tokens = max(int(length * density), least)
    return min(tokens, length)


def check_dense(method: str, density: float | None, dense: int, layers: int) -> None:
    """Raise UsageError where dense layers leave nothing to the others."""
    if dense >= layers:
        raise UsageError(f"{method}: dense={dense} leaves none of {layers} layers to choose in")
    if density is not None and share_beside_dense(density, dense, layers) <= 0:
        raise UsageError(
            f"{method}: {dense} of {layers} layers run dense, which is more than a density of "
            f"{density} allows; give fewer dense layers, or tokens, which is a budget of the others"
        )


def share_beside_dense(density: float, dense: int, layers: int) -> float:
    """The share of keys in each other layer, where the first `dense` layers read all of them."""
    return (density * layers - dense) / (layers - dense)
