"""The headline table, the same for terminal and page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def headline(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, dense, sparse, sparse over dense) of quality, bytes, FLOPs and speed."""
    quality, size, work = result["quality"], result["bytes"], result["flops"]
    speed = result["speed"]
    return [
        row(f"{quality['metric']} ({better(quality)} is better)", quality, ".4f"),
        ("bytes of the pruned layers", human(size["dense"]), human(size["sparse"]), ratio(size)),
        ("FLOPs per token", human(work["dense"]), human(work["sparse"]), ratio(work)),
        row(f"speed, {speed['unit']}", speed, ".1f"),
        *same_loop(speed),
    ]


def better(quality: Mapping[str, Any]) -> str:
    """`lower` or `higher`."""
    return str(quality.get("better", "lower"))


def same_loop(speed: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The dense model under our compiled loop: what the loop gives, apart from the zeros."""
    if not speed.get("dense_compiled"):
        return []
    pair = {"dense": speed["dense_compiled"], "sparse": speed["sparse"]}
    return [row(f"the same, dense in our compiled loop too, {speed['unit']}", pair, ".1f")]


def human(number: float) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f}"


def row(name: str, pair: Mapping[str, Any], form: str) -> tuple[str, str, str, str]:
    """Cells of a pair of numbers, in a format such as `.4f`."""
    return name, format(pair["dense"], form), format(pair["sparse"], form), ratio(pair)


def ratio(pair: Mapping[str, Any]) -> str:
    """Sparse over dense, as 0.56x."""
    return f"{pair['sparse'] / pair['dense']:.2f}x" if pair["dense"] else "-"
