"""SparseGPT on the bundled language model: a small loss at 50% and 2:4, and better than scores alone?"""

from __future__ import annotations

from typing import Any

from claims.language import WHERE, arms
from claims.ledger import main, promise, record

import gossamer as gs


def check(short: bool = False) -> dict[str, Any]:
    """Three seeds at 50% and 2:4."""
    seeds = 2 if short else 3
    methods = {"sparsegpt": gs.weights.SparseGPT(), "magnitude": gs.weights.Magnitude()}
    half = arms({"dense": None, **methods}, seeds, short)
    pairs = arms(methods, seeds, short, pattern=gs.NM(2, 4), density=None)
    dense = half["dense"]
    return record(
        "sparsegpt",
        "50% unstructured and 2:4 in one shot with a small loss and no retraining, better than "
        "pruning without repair.",
        WHERE.format(seeds=seeds),
        half | {f"{name}, 2:4": values for name, values in pairs.items()},
        [
            promise(
                "50%: no more than 5% above dense", [1.05 * x for x in dense], half["sparsegpt"]
            ),
            promise("50%: fewer bits than magnitude", half["magnitude"], half["sparsegpt"]),
            promise("2:4: fewer bits than magnitude", pairs["magnitude"], pairs["sparsegpt"]),
        ],
        remark="Wanda beside it: see its claim, and pruning_quality.json for all methods.",
    )


if __name__ == "__main__":
    main(check)
