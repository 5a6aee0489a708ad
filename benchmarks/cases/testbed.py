"""The bundled model against xz and a 5-gram model, in bits per byte of the held-out text.

The 5-gram model sees the whole training text where Debian's python3.11-doc is installed, as for
training; else only the bundled part of it. Writes benchmarks/results/testbed.json.
Run: python benchmarks/cases/testbed.py
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import gossamer
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import baselines, calibration_text, corpus, heldout_text, language_model
from gossamer.testbed.train import DOCS

OUT = Path(__file__).parents[1] / "results" / "testbed.json"


def main() -> None:
    text = heldout_text()
    whole = Path(DOCS).is_dir()
    if whole:
        files = corpus.read(Path(DOCS), Path(sysconfig.get_path("stdlib")))
        training = corpus.split(files)[0]
    else:
        training = calibration_text()
    facts = json.loads((Path(gossamer.__file__).parent / "testbed/data/train.json").read_text())
    record = {
        "metric": f"bits per byte on the bundled held-out text ({len(text)} bytes); lower is better",
        "windows": "256 bytes, not overlapping, each byte after the first of its window scored",
        "dense": bits_per_byte(language_model(), text),
        "dense_first_40000_bytes": bits_per_byte(language_model(), text[:40_000]),
        "xz": baselines.xz_bits_per_byte(text),
        "ngram5": baselines.ngram_bits_per_byte(text, training),
        "ngram5_training_bytes": len(training),
        "train": facts,
        "machine": machine(),
    }
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
