"""The headline table, the same for terminal and page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDE = 0.1
"""The range of a ratio, as a share of it, from which on it is printed."""


def headline(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, dense, sparse, sparse over dense) of quality, bytes, FLOPs and speed.

    Files of older versions hold fewer of them.
    """
    quality, size = result["quality"], result["bytes"]
    rows = [
        row(f"{quality['metric']} ({better(quality)} is better)", quality, ".4f"),
        amounts("bytes of the pruned layers", size),
    ]
    if size.get("files") and size.get("model_dense"):
        whole = {"dense": size["model_dense"], "sparse": size["files"]}
        rows.append(amounts("bytes of the whole model's files", whole))
    for work in (result["flops"], result.get("flops_pruned")):
        if work:
            rows.append(amounts(f"FLOPs {work['what']}", work))
    return rows + speeds(result["speed"])


def amounts(name: str, pair: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Cells of a pair of large numbers."""
    return name, human(pair["dense"]), human(pair["sparse"]), ratio(pair)


def better(quality: Mapping[str, Any]) -> str:
    """`lower` or `higher`."""
    return str(quality.get("better", "lower"))


def speeds(speed: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What sparsity gives, in the same loop; then, where that is another, what the loop adds."""
    unit = speed["unit"] + (", machine busy" if speed.get("disturbed") else "")
    if not speed.get("dense_compiled"):
        return [_ranged(row(f"speed, {unit}", speed, ".1f"), speed)]
    alone = {"dense": speed["dense_compiled"], "sparse": speed["sparse"]}
    return [
        _ranged(row(f"speed from sparsity alone, {unit}", alone, ".1f"), speed),
        row(f"speed from sparsity and loop, {unit}", speed, ".1f"),
    ]


def _ranged(
    cells: tuple[str, str, str, str], speed: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    """With the range over the rounds beside the ratio, where that is wide."""
    low, high = speed.get("gain_low", 1.0), speed.get("gain_high", 1.0)
    if high - low <= WIDE * gain(speed):
        return cells
    return (*cells[:3], f"{cells[3]} ({low:.2f} to {high:.2f})")


def gain(speed: Mapping[str, Any]) -> float:
    """Sparse over dense in the same loop: what sparsity alone gives."""
    return float(speed["sparse"] / (speed.get("dense_compiled") or speed["dense"]))


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
