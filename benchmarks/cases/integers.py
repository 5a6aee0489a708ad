"""Zeros, integers and both on the bundled model: bits per byte against bytes.

Rounds to the nearest integer with a scale per row and group; quality on the first 30 kB of held-out
text, with exact inputs and with inputs rounded to 8 bits as decoding rounds them.
Writes benchmarks/results/integers.json. Run: python benchmarks/cases/integers.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn

import gossamer as gs
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.nn import QuantizedLinear
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops.quantized import reference
from gossamer.testbed import calibration_batches, heldout_text, language_model

OUT = Path(__file__).parents[1] / "results" / "integers.json"
TEXT = heldout_text()[:30000]


def quality(model: nn.Module) -> float:
    return bits_per_byte(model, TEXT)


def rounded_inputs(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (reference.quantize_input(args[0]),))
        for layer in layers
    ]
    found = quality(model)
    for handle in handles:
        handle.remove()
    return found


def main() -> None:
    dense = language_model()
    names = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    weights = sum(dense.get_submodule(name).weight.numel() for name in names)
    rows = []
    for density in (1.0, 0.7, 0.5):
        model = copy.deepcopy(dense)
        if density < 1:
            gs.prune(
                model, gs.weights.SparseGPT(), density=density, data=calibration_batches(n=128)
            )
        packed = 2 * weights
        if density < 1:
            half = copy.deepcopy(model).to(torch.bfloat16)
            result = gs.compress(half)
            packed = sum(r.sparse_bytes for r in result.layers if r.name in names)
        rows.append(
            {"density": density, "bits": 16, "bits_per_byte": quality(model), "bytes": packed}
        )
        for bits, group in ((8, 128), (4, 128)):
            small = copy.deepcopy(model)
            result = gs.compress(small, bits=bits, group=group)
            rows.append(
                {
                    "density": density,
                    "bits": bits,
                    "group": group,
                    "bits_per_byte": quality(small),
                    "bits_per_byte_rounded_inputs": rounded_inputs(small),
                    "bytes": sum(r.sparse_bytes for r in result.layers if r.name in names),
                }
            )
            print(rows[-1], flush=True)
    record = {
        "text_bytes": len(TEXT),
        "method": "SparseGPT, then rounding to nearest",
        "machine": machine(),
        "rows": rows,
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
