"""TEAL on SmolLM2-135M: half of the weights unread at little loss?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.choosing import DENSITIES, WHERE, measured, named
from gossamer.claims.ledger import Claim, Figures, Promise, promise


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits at every density, by the greedy allocation, and at half by the uniform one."""
    made = {f"{d:g}": named(gs.activations.TEAL, d, short) for d in DENSITIES}
    made["0.5 uniform"] = gs.activations.TEAL(0.5, allocation="uniform")
    return measured(made, seed, short)


def promises(found: Figures) -> list[Promise]:
    """Near dense at 40 and 50% sparsity; greedy above uniform; the density that was asked."""
    lines = [
        promise(f"no more than 0.05 bits above dense at density {d:g}", "quality",
                found["dense"], found[f"{d:g}"], 0.05)
        for d in DENSITIES[:2]
    ]  # fmt: skip
    lines.append(
        promise("fewer bits by greedy than by equal densities, at half", "quality",
                found["0.5 uniform"], found["0.5"])
    )  # fmt: skip
    lines += [
        promise(f"no more than 0.02 above density {d:g}", "mechanism", [d] * len(found["dense"]),
                found[f"{d:g} density"], 0.02)
        for d in DENSITIES
    ]  # fmt: skip
    return lines


CLAIM = Claim(
    gs.activations.TEAL,
    "40 to 50% of weights unread over the whole model with little loss of quality.",
    WHERE,
    one,
    promises,
    looks=(3,),
    remark="The speed is measured by benchmarks/cases/activations.py.",
    threads=None,
)
