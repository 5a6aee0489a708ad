"""SmolLM2-135M for the claims about language models: bits per byte after pruning by a method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gossamer as gs
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.measure.tasks import Language, Subject
from gossamer.testbed import calibration_text, heldout_text, language_model
from gossamer.testbed.packaged import folder

WINDOW, SAMPLES, HELD_OUT = 512, 32, 40_000
"""Tokens per window, calibration windows, and bytes of held-out text."""
WHERE = (
    "SmolLM2-135M, a Llama with grouped queries, pruned in float32 and stored in bfloat16; 32 "
    "calibration windows of 512 tokens from each seed; bits per byte on 40 kB of held-out text, "
    "lower is better. Seeds vary the calibration windows alone: dense and magnitude "
    "read no data and are the same on every seed."
)


def subject(dtype: torch.dtype = torch.float32) -> Subject:
    """SmolLM2 with its tokenizer; raises UsageError where it was never fetched."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = folder("smollm2")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, local_files_only=True)
    return Subject(model.eval(), AutoTokenizer.from_pretrained(place, local_files_only=True))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def pruned(
    method: Any, density: float, seed: int, short: bool, pattern: str = "unstructured"
) -> tuple[float, gs.PruneResult | None]:
    """Bits per byte of held-out text, and what pruning told; method None is dense.

    The short form takes the bundled byte-level model, 2 kB of text, and prunes its last block.
    """
    result = None
    on = Subject(language_model(), None) if short else subject()
    text = heldout_text()[: 2_000 if short else HELD_OUT]
    if method is not None:
        window, samples = (256, 4) if short else (WINDOW, SAMPLES)
        data = Language(on, text).calibration(calibration_text(), samples, window, seed)
        left = [f"model.layers.{block}.*" for block in range(4)] if short else []
        result = gs.prune(
            on.model, method, density=density, pattern=pattern, data=data, exclude=left
        )
        cast(on.model, torch.bfloat16)
        cast(on.model, torch.float32)
    found = bits_per_byte(on.model, text, window=256 if short else WINDOW, encode=on.encode)
    return found, result


PATTERNS = ("unstructured", "2:4")
METHODS = {
    "magnitude": gs.weights.Magnitude,
    "wanda": gs.weights.Wanda,
    "sparsegpt": gs.weights.SparseGPT,
}


def figure(name: str, pattern: str) -> str:
    """What a figure of `one` is called."""
    return name if pattern == "unstructured" else f"{name} {pattern}"


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of the dense model, and of each method at 50% in each pattern."""
    found = {"dense": pruned(None, 0.5, seed, short)[0]}
    for pattern in PATTERNS:
        for name, method in METHODS.items():
            found[figure(name, pattern)] = pruned(method(), 0.5, seed, short, pattern)[0]
    return found
