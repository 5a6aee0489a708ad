"""The ledger of claims: what a method promises, what came out here, and the verdict.

A claims file has one function, `check(short)`, which trains or prunes over several seeds and returns
a record; `python -m claims.<method>`, run in the folder benchmarks, writes it. A promise is a list of differences, one per seed,
that ought to be above zero; the verdict follows from them and from nothing else.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer.nn.kernel_choice.machine import machine

RESULTS = Path(__file__).resolve().parents[1] / "results" / "claims"
HOLDS, FAILS, UNTESTABLE = "holds", "does not hold here", "not testable at this size"
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and half the width of the 95% confidence interval (Student's t)."""
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "ci95": half}


def promise(
    what: str, more: Sequence[float], less: Sequence[float] | float = 0.0, slack: float = 0.0
) -> dict[str, Any]:
    """That `more` is above `less`, seed by seed, with the whole interval above zero.

    slack: how far below counts as no worse; the promise is then that more > less - slack.
    """
    others = [less] * len(more) if isinstance(less, float) else less
    differences = [a - b for a, b in zip(more, others, strict=True)]
    found = interval(differences)
    met = found["mean"] - found["ci95"] > -slack
    excluded = found["mean"] + found["ci95"] <= -slack
    return {
        "what": what, "slack": slack, "differences": differences, **found,
        "met": met, "excluded": excluded,
    }  # fmt: skip


def verdict(promises: Sequence[Mapping[str, Any]]) -> str:
    """Holds where every promise is met; does not where the interval of one excludes it. Between,
    some interval holds both the claim and its opposite, and so few seeds do not decide."""
    if any(p["excluded"] for p in promises):
        return FAILS
    return HOLDS if all(p["met"] for p in promises) else UNTESTABLE


def figures(promises: Sequence[Mapping[str, Any]]) -> str:
    """The promises with their differences, and what became of each."""

    def outcome(p: Mapping[str, Any]) -> str:
        return "met" if p["met"] else "not met" if p["excluded"] else "undecided"

    parts = [f"{p['what']}: {p['mean']:+.4f} ± {p['ci95']:.4f}, {outcome(p)}" for p in promises]
    return ". ".join(parts) + "."


def record(
    method: str,
    claimed: str,
    where: str,
    arms: Mapping[str, Sequence[float]],
    promises: Sequence[Mapping[str, Any]],
    *,
    remark: str = "",
    untestable: str = "",
) -> dict[str, Any]:
    """What is written down. untestable: why this size cannot decide, whatever the promises say."""
    return {
        "method": method,
        "claimed": claimed,
        "where": where,
        "measured": {name: {"seeds": list(v), **interval(v)} for name, v in arms.items()},
        "promises": list(promises),
        "verdict": UNTESTABLE if untestable else verdict(promises),
        "why": " ".join(x for x in (untestable, figures(promises), remark) if x),
    }


def main(check: Callable[[bool], dict[str, Any]]) -> None:
    """Run the whole check on one core and write its record; with --short run the short form."""
    torch.set_num_threads(1)
    start, short = time.monotonic(), "--short" in sys.argv
    found = check(short)
    print(found["method"], found["verdict"], found["why"], f"({time.monotonic() - start:.0f} s)")
    if not short:
        found["machine"] = machine()
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (RESULTS / f"{found['method']}.json").write_text(text + "\n")
