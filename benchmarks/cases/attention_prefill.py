"""Sparse prefill of SmolLM2-135M: quality, recall, density and time of every chooser.

Prompts of 2048 and 4096 tokens of the bundled held-out text, and of 512 and 1024 for attention
alone. For each method and setting: bits per byte of the prompt, and of the text behind it read with
dense attention from the cache that the sparse prefill left; recall of attention and error of
outputs against dense; the measured density; seconds of the whole prefill and of attention alone,
choice included, on layers captured from the dense run. Seconds are processor time of one thread,
methods in turns, medians. A part that was measured is kept, so that a stopped run goes on. Needs
the model (`gossamer testbed fetch smollm2`). Writes
benchmarks/results/attention_prefill.json.
Run: OMP_NUM_THREADS=1 python benchmarks/cases/attention_prefill.py [--only vertical]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.engine.inputs.attend import run_layout
from gossamer.engine.inputs.counting import full_layout
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops.attention import kernel_name
from gossamer.testbed import heldout_text, packaged

OUT = Path(__file__).parents[1] / "results" / "attention_prefill.json"
METHODS = (
    "streamingllm:window=512",
    "streamingllm:window=1024",
    "blocksparse:block=64,density=0.25",
    "blocksparse:block=64,density=0.5",
    "blocksparse:block=16,density=0.25",
    "verticalslash:verticals=128,slashes=128",
    "verticalslash:verticals=512,slashes=512",
    "flexprefill:share=0.65,least=64",
    "flexprefill:share=0.9,least=64",
    "anchorattention:theta=4,step=4",
    "anchorattention:theta=8,step=4",
    "anchorattention:theta=12,step=4",
)
DENSE = "dense layout"


@dataclass(frozen=True)
class Plan:
    """What is measured; a record made with another plan is not continued."""

    lengths: tuple[int, ...] = (2048, 4096)
    short: tuple[int, ...] = (512, 1024)
    behind: int = 256
    prompts: int = 1
    layers: tuple[int, ...] = (0, 7, 14, 21, 28)
    rounds: int = 3
    prefills: int = 1


class Bench:
    """The model, the prompts and the captured layers of one length."""

    def __init__(self, plan: Plan, length: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = packaged.folder("smollm2")
        self.plan, self.length = plan, length
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        text = heldout_text().decode("utf-8", "replace")
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        size = length + plan.behind
        count = min(plan.prompts, len(ids) // size)
        self.prompts = [ids[i * size : (i + 1) * size].unsqueeze(0) for i in range(count)]

    def opened(self, name: str, measure: bool = False) -> Any:
        """The block that a method's name stands for; nothing for transformers' own attention."""
        if name == "sdpa":
            return contextlib.nullcontext()
        method = Everything() if name == DENSE else name
        return gs.sparse_attention(self.model, method, dense_below=0, measure=measure)

    def quality(self, name: str) -> dict[str, Any]:
        """Bits per byte of prompts and of what follows, and how near attention is to dense."""
        bits: dict[str, list[float]] = {"prompt": [], "behind": []}
        results = []
        for ids in self.prompts:
            with self.opened(name, measure=True) as run:
                out = self.model.model(ids[:, : self.length], use_cache=True)
            if run is not None:
                results.append(run.result)
            text = self.tokenizer.decode(ids[0, 1 : self.length])
            bits["prompt"].append(
                self.nats(out.last_hidden_state, ids[0, 1 : self.length]) / cost(text)
            )
            rest = ids[:, self.length :]
            after = self.model.model(rest, past_key_values=out.past_key_values, use_cache=True)
            text = self.tokenizer.decode(rest[0, 1:])
            bits["behind"].append(self.nats(after.last_hidden_state, rest[0, 1:]) / cost(text))
        found: dict[str, Any] = {
            "bits_per_byte": statistics.fmean(bits["prompt"]),
            "bits_per_byte_behind": statistics.fmean(bits["behind"]),
        }
        for key in ("density", "recall", "error"):
            if results:
                found[key] = statistics.fmean(getattr(result, key) for result in results)
        if results:
            first = results[0]
            found["flops_of_dense"] = first.flops / first.dense_flops
            found["bytes_of_dense"] = first.bytes / first.dense_bytes
            found["choosing_flops_of_dense"] = first.choosing_flops / first.dense_flops
            found["density_by_layer"] = [round(layer.density, 4) for layer in first.layers]
            found["recall_by_layer"] = [round(layer.recall, 4) for layer in first.layers]
        return found

    def nats(self, hidden: Tensor, targets: Tensor) -> float:
        """The summed loss of tokens, a few hundred at a time."""
        total = 0.0
        for state, target in zip(hidden[0, :-1].split(256), targets.split(256), strict=True):
            logits = self.model.lm_head(state).float()
            total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
        return total

    def prefill_seconds(self, names: list[str]) -> dict[str, float]:
        """Processor seconds of the whole prefill, in turns."""
        ids = self.prompts[0][:, : self.length]

        def prefill(name: str) -> None:
            with self.opened(name):
                self.model.model(ids, use_cache=True)

        return in_turns(
            {name: lambda name=name: prefill(name) for name in names}, self.plan.prefills
        )

    def captured(self) -> list[AttentionCall]:
        """Queries, keys and values of some layers in the dense run."""
        calls = []

        class Keep:
            card = Everything.card

            def layout(_, call: AttentionCall) -> Any:
                if call.layer in self.plan.layers:
                    calls.append(call)
                return full_layout(call)

        with gs.sparse_attention(self.model, Keep(), dense_below=0):
            self.model.model(self.prompts[0][:, : self.length], use_cache=False)
        return calls

    def attention_seconds(self) -> dict[str, Any]:
        """Processor seconds of attention alone over the captured layers: choice, and all."""
        calls = self.captured()
        choosing: dict[str, Callable[[], Any]] = {}
        whole: dict[str, Callable[[], Any]] = {}
        for name in (DENSE, *METHODS):
            method = Everything() if name == DENSE else build(name)
            choosing[name] = lambda m=method: [m.layout(call) for call in calls]
            whole[name] = lambda m=method: [run_layout(call, m.layout(call)) for call in calls]
        whole["sdpa"] = lambda: [
            nn.functional.scaled_dot_product_attention(
                c.query, c.key, c.value, is_causal=True, enable_gqa=True, scale=c.scale
            )
            for c in calls
        ]
        seconds = in_turns(whole, self.plan.rounds)
        chosen = in_turns(choosing, self.plan.rounds)
        return {
            name: {
                "seconds": value,
                "choosing_seconds": chosen.get(name, 0.0),
                "over_sdpa": seconds["sdpa"] / value,
                "over_dense_layout": seconds[DENSE] / value,
            }
            for name, value in seconds.items()
        }


class Everything:
    """The dense layout as a method."""

    card = gs.attention.BlockSparse.card

    def layout(self, call: AttentionCall) -> Any:
        """All tiles."""
        return full_layout(call)


def build(name: str) -> Any:
    from gossamer.methods import build as made

    return made(name)


def cost(text: str) -> float:
    """Nats that are one bit for each byte of a text."""
    return math.log(2) * len(text.encode())


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median processor seconds of each function, all in turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            found[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def parts(plan: Plan) -> list[str]:
    """What is measured, by name; attention alone first, and whole prefills last."""
    quality = [f"{n}: {name}" for n in plan.lengths for name in ("sdpa", DENSE, *METHODS)]
    return [
        *(f"{n}: attention" for n in (*plan.short, *plan.lengths)), *quality,
        *(f"{n}: prefill" for n in plan.lengths),
    ]  # fmt: skip


def measure(bench: Bench, what: str) -> dict[str, Any]:
    """One part."""
    if what == "attention":
        return bench.attention_seconds()
    if what == "prefill":
        seconds = bench.prefill_seconds(["sdpa", DENSE, *METHODS])
        return {
            name: {"seconds": value, "over_sdpa": seconds["sdpa"] / value}
            for name, value in seconds.items()
        }
    return bench.quality(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan()
    record: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, float32, one thread",
        "kernel": kernel_name(),
        "metric": "bits per byte of the prompt, attended sparsely, and of the 256 tokens behind "
        "it, read densely from the cache it left; lower is better",
        "seconds": "processor time of one thread; attention: of the layers captured, with choice",
        "plan": json.loads(json.dumps(asdict(plan))),
        "machine": machine(),
        "parts": {},
    }
    if args.out.exists():
        old = json.loads(args.out.read_text())
        record["parts"] = old["parts"] if old["plan"] == record["plan"] else {}
    bench: Bench | None = None
    for name in parts(plan):
        if name in record["parts"] or args.only not in name:
            continue
        length, what = name.split(": ", 1)
        if bench is None or bench.length != int(length):
            bench = Bench(plan, int(length))
        print(name, file=sys.stderr, flush=True)
        with torch.no_grad():
            record["parts"][name] = measure(bench, what)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
