"""Caches on SmolLM2-135M: quality by budget, decoding speed and memory of every method.

Three seeds of two needle prompts: a five-digit number in 1,500 tokens of the bundled held-out text,
asked for at the end. Three windows of held-out text: 1,024 tokens as a prompt, then 16 given one by
one, in bits per byte. All methods start from one dense prefill of each prompt and decode from it at
equal numbers of keys a head. Besides them, random keys are evicted at the same budgets, with the
same first and last keys fixed. Speed: processor seconds of one thread for one token behind 4,096,
methods in turns, medians; the keys are those of a prompt, repeated. A part that was measured is
kept, so that a stopped run goes on. Needs the model (`gossamer testbed fetch smollm2`). Writes
benchmarks/results/attention_caches.json.
Run: OMP_NUM_THREADS=1 python benchmarks/cases/attention_caches.py [--only needle]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.core.attention import CachedKeys
from gossamer.core.budget import TopK
from gossamer.nn.kernel_choice.machine import machine
from gossamer.ops.attention import kernel_name
from gossamer.testbed import calibration_text, heldout_text
from gossamer.testbed.packaged import folder

OUT = Path(__file__).parents[1] / "results" / "attention_caches.json"
METHODS = ("streamingllm", "snapkv", "adasnapkv", "quest", "doublesparsity", "random")
DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """What is measured; a record made with another plan is not continued."""

    budgets: tuple[int, ...] = (384, 136)
    seeds: tuple[int, ...] = (0, 1, 2)
    needles: int = 2
    needle_tokens: int = 1500
    answer: int = 6
    prompt: int = 1024
    behind: int = 17
    calibration: int = 8
    timed: int = 4096
    steps: int = 12


@dataclass(frozen=True)
class RandomKeys:
    """First and last keys as SnapKV fixes them, and random ones."""

    tokens: int
    seed: int = 0
    sinks: int = 4
    window: int = 128
    last: int = 256

    card = gs.attention.SnapKV.card

    def kept_keys(self, cached: CachedKeys) -> Tensor:
        """bool (kv_heads, rows)."""
        generator = torch.Generator().manual_seed(self.seed + cached.layer)
        scores = torch.rand(cached.positions.shape, generator=generator)
        place = cached.positions
        always = (place < self.sinks) | (place >= cached.length - self.window)
        return gs.keep(scores, TopK(self.tokens), always=always)


class Bench:
    """The model, and dense prefills from which every method starts."""

    def __init__(self, plan: Plan) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = folder("smollm2")
        self.plan = plan
        self.tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        text = heldout_text().decode("utf-8", "replace")
        self.ids = torch.tensor(self.tokenizer(text)["input_ids"])
        self._calibrated: Any = None

    def method(self, name: str, tokens: int) -> Any:
        """One of METHODS at a number of keys a head."""
        if name == "streamingllm":
            return gs.attention.StreamingLLM(window=tokens - 4)
        if name == "random":
            return RandomKeys(tokens)
        if name == "doublesparsity":
            return gs.attention.DoubleSparsity(tokens, channels=self.calibrated.channels)
        if name == "quest":
            return gs.attention.Quest(tokens)
        kind = {"snapkv": gs.attention.SnapKV, "adasnapkv": gs.attention.AdaSnapKV}[name]
        return kind(tokens)

    @property
    def calibrated(self) -> Any:
        """Double Sparsity with channels, found once."""
        if self._calibrated is None:
            text = calibration_text()[:200_000].decode("utf-8", "replace")
            ids = torch.tensor(self.tokenizer(text)["input_ids"])
            data = [ids[i * 512 : (i + 1) * 512].unsqueeze(0) for i in range(self.plan.calibration)]
            self._calibrated = gs.calibrate_attention(
                self.model, gs.attention.DoubleSparsity(), data
            )
        return self._calibrated

    def prefilled(self, ids: Tensor) -> Any:
        """A cache whose prompt is open, with its last queries, for any method to go on from."""
        cache = gs.attention_cache(self.model, gs.attention.SnapKV())
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def forked(self, base: Any, method: Any) -> Any:
        """A copy of an open prompt, for another method."""
        cache = gs.attention_cache(self.model, method)
        cache.start_from(base)
        return cache

    def starts(self, base: Any) -> dict[str, Any]:
        """Each configuration's cache, made when it is asked for."""
        found: dict[str, Any] = {DENSE: lambda: self.forked(base, gs.attention.Quest(10**6))}
        for name in METHODS:
            for tokens in self.plan.budgets:
                method = self.method(name, tokens)
                found[f"{name}:{tokens}"] = lambda m=method: self.forked(base, m)
        return found

    def needle(self, seed: int) -> dict[str, Any]:
        """Answers found, of `needles`, and the figures of the last prompt."""
        plan, found = self.plan, {}
        draw = random.Random(seed)
        for _ in range(plan.needles):
            code = str(draw.randint(10000, 99999))
            first = draw.randrange(0, len(self.ids) - plan.needle_tokens)
            hay = self.ids[first : first + plan.needle_tokens]
            place = draw.randint(plan.needle_tokens // 8, plan.needle_tokens * 7 // 8)
            before, after = (self.tokenizer.decode(x) for x in (hay[:place], hay[place:]))
            prompt = (
                f"<|im_start|>user\n{before}\n\nThe secret number is {code}. Remember it.\n\n{after}"
                "\n\nWhat is the secret number mentioned in the text? Answer with the number only."
                "<|im_end|>\n<|im_start|>assistant\nThe secret number is"
            )
            ids = torch.tensor(self.tokenizer(prompt)["input_ids"]).unsqueeze(0)
            base = self.prefilled(ids[:, :-1])
            for name, start in self.starts(base).items():
                cache = start()
                answer = gs.generate(self.model, ids[:, -1:], plan.answer, eos=(), cache=cache)
                right = code in self.tokenizer.decode(answer[0, 1:])
                entry = found.setdefault(name, {"found": 0, **figures(cache)})
                entry["found"] += right
        return found

    def text(self, seed: int) -> dict[str, Any]:
        """Bits per byte of tokens given one by one behind a prompt."""
        plan = self.plan
        size = plan.prompt + plan.behind
        first = random.Random(seed).randrange(0, len(self.ids) - size)
        ids = self.ids[first : first + size].unsqueeze(0)
        base = self.prefilled(ids[:, : plan.prompt])
        rest = ids[0, plan.prompt :]
        nats = math.log(2) * len(self.tokenizer.decode(rest[1:]).encode())
        found = {}
        for name, start in self.starts(base).items():
            cache, total = start(), 0.0
            for now, target in pairwise(rest):
                logits = self.model(now.reshape(1, 1), past_key_values=cache).logits[0, -1]
                total += float(nn.functional.cross_entropy(logits.float(), target))
            found[name] = {"bits_per_byte": total / nats, **figures(cache)}
        return found

    def speed(self) -> dict[str, Any]:
        """Processor seconds of one token, in turns; transformers' own cache among them."""
        from transformers import DynamicCache

        plan = self.plan
        base = self.prefilled(self.ids[:1024].unsqueeze(0))
        self.lengthen(base, plan.timed)
        caches: dict[str, Any] = {"transformers": DynamicCache(config=self.model.config)}
        for index, layer in enumerate(base.layers):
            held = layer._open
            caches["transformers"].update(held.key.used, held.value.used, index)
        for name in METHODS:
            if name != "random":
                for tokens in (plan.timed // 16,):
                    caches[f"{name}:{tokens}"] = self.forked(base, self.method(name, tokens))
        caches["every key"] = self.forked(base, gs.attention.Quest(10**6))
        token, seconds = self.ids[:1].unsqueeze(0), {name: [] for name in caches}
        for step in range(plan.steps + 2):
            for name, cache in caches.items():
                start = time.process_time()
                self.model(token, past_key_values=cache)
                if step >= 2:  # the first evicts, the second warms
                    seconds[name].append(time.process_time() - start)
        own = statistics.median(seconds["transformers"])
        return {
            name: {
                "seconds": statistics.median(values),
                "tokens_per_second": 1 / statistics.median(values),
                "over_transformers": own / statistics.median(values),
                **(figures(caches[name]) if name != "transformers" else {}),
            }
            for name, values in seconds.items()
        }

    def lengthen(self, base: Any, tokens: int) -> None:
        """Repeat an open prompt's keys until there are so many."""
        for layer in base.layers:
            held = layer._open
            while held.key.length < tokens:
                more = min(1024, tokens - held.key.length)
                held.append(
                    type("More", (), {
                        "key": held.key.used[:, :, :more].clone(),
                        "value": held.value.used[:, :, :more].clone(),
                        "real": None, "query": torch.empty(1, 9, more, 64, dtype=torch.bfloat16),
                    })
                )  # fmt: skip
            layer.seen = tokens


def figures(cache: Any) -> dict[str, float]:
    """Of a cache's result."""
    result = cache.result if cache.layers[0].tokens else None
    if result is None:
        return {}
    return {
        "density": round(result.density, 4),
        "bytes_read_of_dense": round(result.bytes_per_token / result.dense_bytes_per_token, 4),
        "choosing_of_dense": round(
            result.choosing_bytes_per_token / result.dense_bytes_per_token, 4
        ),
        "resident_of_dense": round(result.resident_bytes / result.dense_bytes, 4),
        "resident_bytes": result.resident_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan()
    record: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, bfloat16, one thread",
        "kernel": kernel_name(),
        "plan": json.loads(json.dumps(asdict(plan))),
        "machine": machine(),
        "parts": {},
    }
    if args.out.exists():
        old = json.loads(args.out.read_text())
        record["parts"] = old["parts"] if old["plan"] == record["plan"] else {}
    parts = [f"{what} {seed}" for seed in plan.seeds for what in ("needle", "text")] + ["speed"]
    wanted = [name for name in parts if name not in record["parts"] and args.only in name]
    if not wanted:
        return
    bench = Bench(plan)
    for name in wanted:
        print(name, file=sys.stderr, flush=True)
        what, _, seed = name.partition(" ")
        with torch.no_grad():
            found = bench.speed() if what == "speed" else getattr(bench, what)(int(seed))
        record["parts"][name] = found
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
