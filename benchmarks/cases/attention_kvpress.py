"""Kept sets of SnapKV and Ada-SnapKV beside those of NVIDIA's kvpress, key by key, on SmolLM2-135M.

kvpress wants an older transformers, so it runs in an environment of its own, whose python is given:
it saves what it keeps of 640 tokens of held-out text at a quarter of the keys, window and last
queries of 64, averages over 5. Ours are then compared with it, as the card has it, and by kvpress's
rules where they differ: it leaves the window's own keys out of the averages, and ranks Ada's keys by
SnapKV's means instead of maxima. Needs the model (`gossamer testbed fetch smollm2`). Writes
benchmarks/results/attention_kvpress.json.
Run: python benchmarks/cases/attention_kvpress.py --theirs /path/to/kvpress-env/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gossamer as gs
from gossamer.core.attention import CachedKeys
from gossamer.methods.attention.evicting import last_attention, smoothed
from gossamer.nn.kernel_choice.machine import machine
from gossamer.testbed import heldout_text
from gossamer.testbed.packaged import folder

OUT = Path(__file__).parents[1] / "results" / "attention_kvpress.json"
TOKENS, WINDOW, KERNEL = 640, 64, 5
OPTIONS = {"tokens": TOKENS // 4, "last": WINDOW, "sinks": 0, "window": WINDOW, "kernel": KERNEL}
THEIRS = """
import json, sys, torch, kvpress, transformers
from dataclasses import dataclass
from importlib.metadata import version
from kvpress import AdaKVPress, SnapKVPress
model_folder, ids_file, out, window, kernel = sys.argv[1:]
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(
    model_folder, dtype=torch.float32, local_files_only=True).eval()
ids, kept = torch.tensor([json.load(open(ids_file))]), {"snap": [], "ada": []}
options = {"compression_ratio": 0.75, "window_size": int(window), "kernel_size": int(kernel)}

@dataclass
class Snap(SnapKVPress):
    def compress(self, module, hidden, keys, values, attentions, kwargs):
        scores = self.score(module, hidden, keys, values, attentions, kwargs)
        count = int(keys.shape[2] * (1 - self.compression_ratio))
        kept["snap"].append(scores.topk(count, -1).indices[0].sort(-1).values.tolist())
        return super().compress(module, hidden, keys, values, attentions, kwargs)

@dataclass
class Ada(AdaKVPress):
    def compress(self, module, hidden, keys, values, attentions, kwargs):
        found = super().compress(module, hidden, keys, values, attentions, kwargs)
        stays = torch.ones(keys.shape[:3], dtype=torch.bool)
        stays[module.masked_key_indices] = False
        module.masked_key_indices = None
        kept["ada"].append([head.nonzero()[:, 0].tolist() for head in stays[0]])
        return found

with torch.no_grad():
    for press in (Snap(**options), Ada(SnapKVPress(**options))):
        with press(model):
            model(ids, past_key_values=transformers.DynamicCache())
json.dump({"kept": kept, "kvpress": version("kvpress"), "transformers": version("transformers")},
          open(out, "w"))
"""
Sets = list[list[set[int]]]


@dataclass(frozen=True)
class EdgeSnapKV(gs.attention.SnapKV):
    """SnapKV whose averages leave the window's keys out, as kvpress's do."""

    def score(self, cached: CachedKeys) -> Tensor:
        """float32 (kv_heads, rows)."""
        scores = last_attention(cached, "sum").unflatten(0, (-1, cached.shared)).mean(1)
        before = cached.length - self.window
        scores[:, :before] = smoothed(scores[:, :before], self.kernel)
        return scores


@dataclass(frozen=True)
class MeanAdaSnapKV(gs.attention.AdaSnapKV):
    """Ada-SnapKV on the scores of EdgeSnapKV."""

    def score(self, cached: CachedKeys) -> Tensor:
        """float32 (kv_heads, rows)."""
        return EdgeSnapKV(**OPTIONS).score(cached)


def ours(ids: Tensor) -> dict[str, Sets]:
    """By method, the places kept, by layer and head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder("smollm2"), dtype=torch.float32, local_files_only=True
    ).eval()
    base, found = gs.attention_cache(model, gs.attention.SnapKV(**OPTIONS)), {}
    with torch.no_grad():
        model(ids, past_key_values=base, logits_to_keep=1)
    for kind in (gs.attention.SnapKV, EdgeSnapKV, gs.attention.AdaSnapKV, MeanAdaSnapKV):
        cache = gs.attention_cache(model, kind(**OPTIONS))
        cache.start_from(base)
        cache.end_prompt()
        found[kind.__name__] = [
            [set(head.tolist()) for head in layer.stored[0].positions[0]] for layer in cache.layers
        ]
    return found


def compared(one: Sets, other: Sets) -> dict[str, Any]:
    """Heads with the same keys, and the share of keys in both."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "heads": len(pairs),
        "heads_identical": sum(a == b for a, b in pairs),
        "keys": sum(len(b) for _, b in pairs),
        "keys_in_both": sum(len(a & b) for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--theirs", required=True, help="python of an environment with kvpress")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("smollm2"), local_files_only=True)
    ids = tokenizer(heldout_text().decode("utf-8", "replace"))["input_ids"][:TOKENS]
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place) / "ids.json", Path(place) / "kept.json"
        given.write_text(json.dumps(ids))
        call = [args.theirs, "-c", THEIRS, str(folder("smollm2")), str(given), str(out)]
        subprocess.run([*call, str(WINDOW), str(KERNEL)], check=True, env=dict(os.environ))
        theirs = json.loads(out.read_text())
    sets = {
        name: [[set(head) for head in layer] for layer in layers]
        for name, layers in theirs.pop("kept").items()
    }
    found, snap, ada = ours(torch.tensor([ids])), sets["snap"], sets["ada"]
    record = {
        "model": "SmolLM2-135M-Instruct, float32",
        "tokens": TOKENS, "options": OPTIONS, **theirs, "machine": machine(),
        "SnapKV": compared(found["SnapKV"], snap),
        "SnapKV, averages without the window's keys": compared(found["EdgeSnapKV"], snap),
        "AdaSnapKV": compared(found["AdaSnapKV"], ada),
        "AdaSnapKV on kvpress's scores": compared(found["MeanAdaSnapKV"], ada),
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
