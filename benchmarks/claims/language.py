"""The bundled language model for the claims: bits per byte after pruning by a method."""

from __future__ import annotations

from typing import Any

import gossamer as gs
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.testbed import calibration_batches, heldout_text, language_model


def bits(method: Any, seed: int, short: bool, *, pattern: Any = None, density: Any = 0.5) -> float:
    """Bits per byte on 12 kB of held-out text from a place given by the seed; lower is better.

    The calibration windows come from the seed too. The short form takes 2 kB and prunes the last
    of the five blocks only. method None: the dense model.
    """
    model = language_model()
    size = 2_000 if short else 12_000
    text = heldout_text()[seed * size :][:size]
    if method is not None:
        data = calibration_batches(n=4 if short else 32, length=256, seed=seed, batch=4)
        left = [f"model.layers.{block}.*" for block in range(4)] if short else []
        gs.prune(model, method, pattern=pattern, density=density, data=data, exclude=left)
    return bits_per_byte(model, text)


def arms(methods: dict[str, Any], seeds: int, short: bool, **how: Any) -> dict[str, list[float]]:
    """Bits per byte of each method on each seed; a method may depend on the seed as a function."""
    found: dict[str, list[float]] = {}
    for name, method in methods.items():
        made = [method(seed) if callable(method) else method for seed in range(seeds)]
        found[name] = [bits(one, seed, short, **how) for seed, one in enumerate(made)]
    return found


WHERE = (
    "Bundled byte-level model, 50% unstructured, 12 kB of held-out text at another place and 32 \
calibration windows for each of {seeds} seeds; bits per byte, lower is better."
)
