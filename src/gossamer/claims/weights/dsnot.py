"""DSnoT on SmolLM2-135M: does swapping weights after Wanda cost fewer bits than Wanda alone?"""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.language import WHERE, pruned
from gossamer.claims.ledger import Claim, Figures, Promise, promise

SPARSITIES = (50, 60)


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of both at each sparsity, and the share of the rows' mean error that is left."""
    found = {}
    for sparsity in SPARSITIES:
        density = 1 - sparsity / 100
        found[f"Wanda, {sparsity}%"] = pruned(gs.weights.Wanda(), density, seed, short)[0]
        method = gs.weights.DSnoT(skip=()) if short else gs.weights.DSnoT()
        found[f"DSnoT, {sparsity}%"], result = pruned(method, density, seed, short)
        assert result is not None
        told = [x for x in result.figures.values() if "error_before" in x]
        left = sum(x["error_after"] for x in told) / sum(x["error_before"] for x in told)
        found[f"error left, {sparsity}%"] = left
    return found


def promises(found: Figures) -> list[Promise]:
    """A smaller mean error of rows, and fewer bits than the start."""
    lines = []
    for sparsity in SPARSITIES:
        left = [1 - value for value in found[f"error left, {sparsity}%"]]
        lines.append(promise(f"a smaller mean error of rows at {sparsity}%", "mechanism", left))
    for sparsity in SPARSITIES:
        start, after = found[f"Wanda, {sparsity}%"], found[f"DSnoT, {sparsity}%"]
        lines.append(promise(f"fewer bits than Wanda at {sparsity}%", "quality", start, after))
    return lines


CLAIM = Claim(
    gs.weights.DSnoT,
    "Without training, a lower perplexity than Wanda alone; by 26.79 on LLaMA-7B at 70%.",
    f"50% and 60% unstructured, from Wanda, with the defaults. {WHERE}",
    one,
    promises,
    looks=(3,),
    threads=None,
)
