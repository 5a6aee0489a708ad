"""SmolLM2-135M for the claims about activations: bits per byte where every token chooses inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import gossamer as gs
from gossamer.claims.language import HELD_OUT, WINDOW, subject
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.measure.tasks import Language, Subject
from gossamer.testbed import calibration_text, heldout_text, language_model

DENSITIES = (0.6, 0.5, 0.35)
SAMPLES = 8
WHERE = (
    "SmolLM2-135M, a Llama with SiLU whose inputs are never zero by themselves, in float32; 8 "
    "calibration windows of 512 tokens from each seed; bits per byte on 40 kB of held-out text in "
    "which every token chooses its inputs, lower is better. Seeds vary the calibration windows alone."
)


@cache
def _on(short: bool) -> Subject:
    return Subject(language_model(), None) if short else subject()


def measured(methods: Mapping[str, Any], seed: int, short: bool) -> dict[str, float]:
    """Bits per byte, measured density, and bytes over dense of each method, and bits of dense.

    The short form takes the bundled byte-level model and 2 kB of text.
    """
    on = _on(short)
    text = heldout_text()[: 2_000 if short else HELD_OUT]
    window, samples = (256, 2) if short else (WINDOW, SAMPLES)
    data = Language(on, text).calibration(calibration_text(), samples, window, seed)

    def bits() -> float:
        return bits_per_byte(on.model, text, window=window, encode=on.encode)

    found = {"dense": bits()}
    for name, method in methods.items():
        plan = gs.calibrate_activations(on.model, method, data)
        with gs.sparsify_activations(on.model, plan, simulate=True, prefill="sparse") as run:
            found[name] = bits()
        told = run.result
        found[f"{name} density"] = float(told.density or 1.0)
        found[f"{name} bytes"] = told.bytes / told.dense_bytes
    return found


def named(kind: Any, density: float, short: bool, **options: Any) -> Any:
    """A method; the short form shares densities equally, which takes seconds."""
    if short and "allocation" not in options and hasattr(kind, "allocation"):
        options["allocation"] = "uniform"
    return kind(density, **options)
