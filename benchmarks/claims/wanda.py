"""Wanda on the bundled language model: above magnitude, without retraining?"""

from __future__ import annotations

from typing import Any

from claims.language import WHERE, arms
from claims.ledger import main, promise, record

import gossamer as gs


def check(short: bool = False) -> dict[str, Any]:
    """Three seeds at 50%."""
    seeds = 2 if short else 3
    methods = {
        "wanda": gs.weights.Wanda(),
        "magnitude": gs.weights.Magnitude(),
        "sparsegpt": gs.weights.SparseGPT(),
    }
    found = arms(methods, seeds, short)
    return record(
        "wanda",
        "Without retraining, well above magnitude pruning, and competitive with SparseGPT.",
        WHERE.format(seeds=seeds),
        found,
        [
            promise("fewer bits than magnitude", found["magnitude"], found["wanda"]),
            promise("within 0.05 bits of SparseGPT", found["sparsegpt"], found["wanda"], 0.05),
        ],
        remark="More patterns and densities, and the MiniLM encoder, where it does hold, are in "
        "pruning_quality.json and minilm.json.",
    )


if __name__ == "__main__":
    main(check)
