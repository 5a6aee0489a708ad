"""WINA on SmolLM2-135M: better than TEAL at equal density?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.choosing import DENSITIES, WHERE, measured, named
from gossamer.claims.ledger import Claim, Figures, Promise, promise


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits of TEAL, of WINA, and of WINA without its rotation, at every density."""
    made = {}
    for density in DENSITIES:
        made[f"teal {density:g}"] = named(gs.activations.TEAL, density, short)
        made[f"wina {density:g}"] = named(gs.activations.WINA, density, short)
        made[f"plain {density:g}"] = named(gs.activations.WINA, density, short, rotate="off")
        made[f"all {density:g}"] = named(gs.activations.WINA, density, short, rotate="all")
    return measured(made, seed, short)


def promises(found: Figures) -> list[Promise]:
    """Fewer bits than TEAL at equal density, with and without the rotation."""
    return [
        promise(f"fewer bits than TEAL at density {d:g}, {what}", "quality",
                found[f"teal {d:g}"], found[f"{name} {d:g}"])
        for d in DENSITIES
        for name, what in (("all", "rotated as published"), ("wina", "leading layers rotated"),
                           ("plain", "without rotation"))
    ]  # fmt: skip


CLAIM = Claim(
    gs.activations.WINA,
    "Better than TEAL at equal sparsity, by up to 2.94% of accuracy on average.",
    WHERE,
    one,
    promises,
    looks=(3,),
    remark="Densities do not count the rotation, as in the paper; the figures in bytes do.",
    threads=None,
)
