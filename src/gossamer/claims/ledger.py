"""The ledger of claims: what a method promises, what came out here, and the verdict.

A claim measures one seed at a time. Seeds are added until every promise is decided or the last look
is spent. A promise is a list of differences, one per seed, that ought to be above zero. The verdict
follows from these differences and from nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gossamer.core.confidence import interval, t_quantile
from gossamer.core.errors import UsageError

HOLDS, FAILS = "holds", "does not hold here"
UNDECIDED, UNTESTABLE = "undecided", "not testable here"
MET, NOT_MET = "met", "not met"

LOOKS = (5, 10, 20)
"""How many seeds have run whenever the figures are judged."""
SHORT = (2,)
MOST_SEEDS = 1000
"""Estimates of the seeds that would decide end here."""

Kind = Literal["mechanism", "quality"]
Figures = Mapping[str, Sequence[float]]
"""Every measured quantity with its figure on each seed."""


@dataclass(frozen=True)
class Promise:
    """One line of a claim: that every difference ought to be above -slack.

    kind: `mechanism` (a mask, a count, an exactness) or `quality`. slack: how far below zero still
    counts as no worse. reason: why this line cannot be tested here; it then has no differences.
    """

    what: str
    kind: Kind
    differences: tuple[float, ...] = ()
    slack: float = 0.0
    reason: str = ""

    def __post_init__(self) -> None:
        if bool(self.reason) == bool(self.differences) or self.slack < 0:
            raise UsageError(
                f"promise {self.what!r} needs either differences or a reason why it cannot be "
                "tested, and a slack of 0 or more"
            )


@dataclass(frozen=True)
class Claim:
    """What a paper claims of a method, and how it is tried.

    one: measures one seed, `(seed, short) -> figures`. promises: compares the figures of all seeds.
    looks: how many seeds have run whenever they are judged. threads: of torch while it runs; None
    leaves them.
    """

    method: type[Any]
    claimed: str
    where: str
    one: Callable[[int, bool], Mapping[str, float]]
    promises: Callable[[Figures], list[Promise]]
    looks: tuple[int, ...] = LOOKS
    remark: str = ""
    threads: int | None = 1


def promise(
    what: str,
    kind: Kind,
    more: Sequence[float],
    less: Sequence[float] | float = 0.0,
    slack: float = 0.0,
) -> Promise:
    """That `more` is above `less`, seed by seed, by more than -slack."""
    others = [less] * len(more) if isinstance(less, float) else less
    return Promise(what, kind, tuple(a - b for a, b in zip(more, others, strict=True)), slack)


def confidence(looks: Sequence[int]) -> float:
    """Of the interval at each look, so that all together err at most 5% of the time (Bonferroni)."""
    return 1 - 0.05 / len(looks)


def judged(one: Promise, looks: Sequence[int]) -> dict[str, Any]:
    """The promise as the record holds it: its interval and what became of it."""
    line: dict[str, Any] = {"what": one.what, "kind": one.kind, "slack": one.slack}
    if one.reason:
        return {**line, "outcome": UNTESTABLE, "reason": one.reason}
    mean, half = interval(one.differences, confidence(looks))
    outcome = _outcome(mean + one.slack, half)
    line |= {"differences": list(one.differences), "mean": mean, "half": half, "outcome": outcome}
    if one.slack:
        line["without_slack"] = _outcome(mean, half)
    if outcome == UNDECIDED:
        line["seeds_to_decide"] = seeds_to_decide(one, looks)
    return line


def _outcome(mean: float, half: float) -> str:
    return MET if mean - half > 0 else NOT_MET if mean + half <= 0 else UNDECIDED


def seeds_to_decide(one: Promise, looks: Sequence[int]) -> int | None:
    """How many seeds would decide if mean and spread stayed as they are; None beyond MOST_SEEDS."""
    distance = abs(statistics.fmean(one.differences) + one.slack)
    spread = statistics.stdev(one.differences)
    upper = (1 + confidence(looks)) / 2
    for seeds in range(2, MOST_SEEDS + 1):
        # The normal quantile is below Student's: most counts are ruled out without it.
        if distance * math.sqrt(seeds) > 1.9 * spread and distance * math.sqrt(seeds) > (
            t_quantile(upper, seeds - 1) * spread
        ):
            return seeds
    return None


def verdict(lines: Sequence[Mapping[str, Any]]) -> str:
    """Fails where a line does; else undecided where one is; else holds where any could be tested."""
    outcomes = {line["outcome"] for line in lines}
    if NOT_MET in outcomes:
        return FAILS
    if UNDECIDED in outcomes:
        return UNDECIDED
    return HOLDS if MET in outcomes else UNTESTABLE


def check(claim: Claim, short: bool = False, tell: Callable[[str], object] = str) -> dict[str, Any]:
    """Try a claim and return its record; `short` takes two seeds of a smaller form.

    tell: called with a label before every seed.
    """
    looks = SHORT if short else claim.looks
    rows: list[Mapping[str, float]] = []
    for look in looks:
        for seed in range(len(rows), look):
            tell(f"seed {seed}")
            rows.append(claim.one(seed, short))
        found = {name: [row[name] for row in rows] for name in rows[0]}
        lines = [judged(one, looks) for one in claim.promises(found)]
        if all(line["outcome"] != UNDECIDED for line in lines):
            break
    return record(claim, found, lines, looks)


def record(
    claim: Claim, found: Figures, lines: Sequence[Mapping[str, Any]], looks: Sequence[int]
) -> dict[str, Any]:
    """What is written down."""
    seeds = len(next(iter(found.values())))
    kinds = sorted({str(line["kind"]) for line in lines})
    measured = {
        name: {"seeds": list(values), "mean": interval(values).mean, "ci95": interval(values).half}
        for name, values in found.items()
    }
    return {
        "method": claim.method.card.name,
        "topic": claim.method.card.topic,
        "claimed": claim.claimed,
        "where": claim.where,
        "seeds": {"run": seeds, "looks": list(looks), "rule": rule(seeds, looks)},
        "measured": measured,
        "promises": list(lines),
        "verdict": verdict(lines),
        "verdicts": {kind: verdict([x for x in lines if x["kind"] == kind]) for kind in kinds},
        "remark": claim.remark,
    }


def rule(seeds: int, looks: Sequence[int]) -> str:
    """How many seeds ran and why, in words."""
    if len(looks) == 1:
        return f"{seeds} seeds, judged once by 95% intervals."
    after = ", ".join(map(str, looks[:-1]))
    return (
        f"{seeds} seeds. The figures were judged after {after} and {looks[-1]} seeds until every "
        f"line was decided. Each look uses intervals of {confidence(looks):.1%}, so a line is "
        "decided wrongly at most 5% of the time over all looks."
    )


def outcome(line: Mapping[str, Any]) -> str:
    """What became of a line, in words."""
    if line["outcome"] == UNTESTABLE:
        return f"{UNTESTABLE}: {line['reason']}"
    words = str(line["outcome"])
    if line["outcome"] == UNDECIDED:
        needed = line["seeds_to_decide"]
        words += f" (about {needed} seeds would decide)" if needed else (
            f" (more than {MOST_SEEDS} seeds would be needed)"
        )  # fmt: skip
    if line["slack"]:
        words += f", slack {line['slack']:g}"
        if line["without_slack"] != line["outcome"]:
            words += f" (without it: {line['without_slack']})"
    return words


def summary(found: Mapping[str, Any]) -> list[str]:
    """A record in words: the verdict, then a sentence per line."""
    lines = [f"{found['method']}: {found['verdict']}. {found['seeds']['rule']}"]
    for line in found["promises"]:
        figures = f" {line['mean']:+.4f} ± {line['half']:.4f}," if "mean" in line else ""
        lines.append(f"{line['kind']}, {line['what']}:{figures} {outcome(line)}")
    return lines
