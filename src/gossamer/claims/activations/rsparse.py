"""R-Sparse on SmolLM2-135M: near dense at half of the weights, and above thresholds alone?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.choosing import WHERE, measured
from gossamer.claims.ledger import Claim, Figures, Promise, promise


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits at half, with the search, with columns alone, and with half of the budget as rank."""
    made = {
        "searched": gs.activations.RSparse(0.5),
        "columns": gs.activations.RSparse(0.5, share=1.0),
        "half": gs.activations.RSparse(0.5, share=0.5),
    }
    return measured(made, seed, short)


def promises(found: Figures) -> list[Promise]:
    """Near dense; the search no worse than columns alone, and better than a fixed half."""
    return [
        promise("no more than 0.05 bits above dense", "quality", found["dense"],
                found["searched"], 0.05),
        promise("fewer bits than columns alone", "quality", found["columns"], found["searched"]),
        promise("fewer bits than half of the budget as rank", "quality", found["half"],
                found["searched"]),
    ]  # fmt: skip


CLAIM = Claim(
    gs.activations.RSparse,
    "Quality like the dense model's at half of the weights, by columns and a low-rank part together.",
    WHERE,
    one,
    promises,
    looks=(3,),
    threads=None,
)
