"""The small language problem of the testbed against models of bytes that see the same text.

The dense model of `Text` by AdamW, three seeds; bits per byte of held-out text. Writes
benchmarks/results/text_problem.json. Run: python benchmarks/cases/text_problem.py
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path

import torch

import gossamer as gs
from gossamer.core.confidence import interval
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import Text, baselines, calibration_text, heldout_text

OUT = Path(__file__).parents[1] / "results" / "text_problem.json"
SEEDS, STEPS, HOW = range(3), (500, 2000), {"lr": 6e-3, "warmup": 50, "clip": 1.0}


def main() -> None:
    torch.set_num_threads(1)
    problem = Text()
    text, training = heldout_text()[: problem.held_out], calibration_text()
    runs = {}
    for steps in STEPS:
        bits, start = [], time.process_time()
        for seed in SEEDS:
            report = gs.measure_training(problem, None, steps=steps, seed=seed, **HOW)
            bits.append(report.facts["quality"]["value"])
            print(steps, seed, bits[-1], file=sys.stderr, flush=True)
        seconds = (time.process_time() - start) / len(bits)
        mean, half = interval(bits)
        runs[str(steps)] = {"seeds": bits, "mean": mean, "ci95": half, "cpu_seconds": seconds}
    record = {
        "metric": f"bits per byte of {len(text)} held-out bytes; lower is better",
        "training_bytes": len(training),
        "parameters": sum(p.numel() for p in problem.build(0).parameters()),
        "recipe": {"optimizer": problem.optimizer, **HOW},
        "steps": runs,
        "bigram": baselines.ngram_bits_per_byte(text, training, order=2),
        "trigram": baselines.ngram_bits_per_byte(text, training, order=3),
        "ngram5": baselines.ngram_bits_per_byte(text, training),
        "gzip_alone": 8 * len(zlib.compress(text, 9)) / len(text),
        "xz_after_training_text": baselines.xz_bits_per_byte(text, training),
        "machine": machine(),
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
