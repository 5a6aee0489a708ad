"""MiniLM sentence encoder at 50%: SparseGPT against Magnitude, by similarity to dense embeddings.

Needs the model (`gossamer testbed fetch minilm`). Sentences come from the docstrings of Python's standard
library, split by module into calibration and held-out ones. Writes
benchmarks/results/minilm.json. Run: python benchmarks/cases/minilm.py
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from gossamer.core.pattern import NM
from gossamer.engine.measure.evaluate import embedding_similarity
from gossamer.engine.prune.run import prune
from gossamer.methods.weights import Magnitude, SparseGPT, Wanda
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed.packaged import folder

OUT = Path(__file__).parents[1] / "results" / "minilm.json"


def sentences() -> tuple[list[str], list[str]]:
    """(calibration, held-out) sentences of the standard library's docstrings, none in both."""
    calibration: dict[str, None] = {}
    held_out: dict[str, None] = {}
    for index, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        found = held_out if index % 3 == 0 else calibration
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                for sentence in re.split(r"(?<=[.!?]) ", text):
                    if 40 <= len(sentence) <= 240:
                        found[sentence] = None
    return list(calibration), [text for text in held_out if text not in calibration]


def batches(tokenizer: Any, texts: list[str], size: int = 16) -> list[dict[str, torch.Tensor]]:
    """Padded token batches, sentences of similar length together."""
    texts = sorted(texts, key=len)
    return [
        dict(tokenizer(texts[at : at + size], padding=True, truncation=True, return_tensors="pt"))
        for at in range(0, len(texts), size)
    ]


def read(place: Path) -> tuple[Any, Any]:
    """(model, tokenizer) from local files only."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(place, local_files_only=True)


def measure(place: Path, calibration: int = 128, held_out: int = 256) -> dict[str, Any]:
    """Mean cosine similarity to the dense embeddings, by pattern and method."""
    dense, tokenizer = read(place)
    first, second = sentences()
    # Evenly spaced, so that every part of the library is represented.
    data = batches(tokenizer, first[:: max(1, len(first) // calibration)][:calibration])
    test = batches(tokenizer, second[:: max(1, len(second) // held_out)][:held_out])
    similarity: dict[str, dict[str, float]] = {}
    for label, pattern, density in (("50%", None, 0.5), ("2:4", NM(2, 4), None)):
        similarity[label] = {}
        for method in (Magnitude(), Wanda(), SparseGPT()):
            model = copy.deepcopy(dense)
            result = prune(model, method, pattern=pattern, density=density, data=data)
            assert abs(result.measured_density - 0.5) < 1e-3
            value = embedding_similarity(dense, model, test)
            similarity[label][result.method] = round(value, 5)
            print(label, result.method, round(value, 5), file=sys.stderr, flush=True)
    return {
        "model": "all-MiniLM-L6-v2",
        "metric": "mean cosine similarity to the dense embeddings, held-out sentences",
        "similarity": similarity,
        "calibration_sentences": sum(len(batch["input_ids"]) for batch in data),
        "held_out_sentences": sum(len(batch["input_ids"]) for batch in test),
        "text": f"docstrings of the standard library of Python {platform.python_version()}",
        "machine": machine(),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--calibration", type=int, default=128, help="sentences")
    parser.add_argument("--held-out", type=int, default=256, help="sentences")
    arguments = parser.parse_args()
    record = measure(folder("minilm"), arguments.calibration, arguments.held_out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
