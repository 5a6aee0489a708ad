"""Activation sparsity of decoding: quality of SmolLM2-135M, and tokens per second there and at 1.1B.

Quality: bits per byte of bundled held-out text in float32, where every token chooses its inputs, so
that it is the quality of decoding; the calibration loss; the measured density; and the bytes that a
token reads, norms, rotations and low-rank parts included.

Speed: greedy decoding at batch size 1 under transformers, dense and sparse in turns, in bfloat16
and with weights of 8 bits. The baseline of integers is the same model with dense integers in the
same loop. `of_bytes` is the gain over what the bytes of a token allow, output head included; 1.0 is
all of it. `dense_compiled` is the dense model under the compiled loop, which does not serve layers
that choose inputs. Before any timing the packed model's logits are compared with the masked dense
model's. The geometry of 1.1 billion weights is random, so it has a speed and no quality.

A part that was measured is kept, so that a stopped run goes on. Needs the model
(`gossamer testbed fetch smollm2`). Writes benchmarks/results/activations.json.
Run: python benchmarks/cases/activations.py [--only speed] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.claims.language import subject
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.engine.serve.decoder import Decoder
from gossamer.nn import QuantizedLinear
from gossamer.nn.kernel_choice.machine import machine
from gossamer.nn.packed.active import ActiveLinear
from gossamer.ops.active import kernel_name
from gossamer.testbed import calibration_text, heldout_text

OUT = Path(__file__).parents[1] / "results" / "activations.json"
DENSITIES = (0.6, 0.5, 0.35)
QUALITY = {
    "teal": "teal:density={}",
    "teal uniform": "teal:density={},allocation=uniform",
    "wina": "wina:density={}",
    "wina as published": "wina:density={},rotate=all",
    "wina without rotation": "wina:density={},rotate=off",
    "wina, norms everywhere, without rotation": "wina:density={},rotate=off,norms=all",
    "rsparse": "rsparse:density={}",
}
SPEED = {"teal": "teal:density={},allocation=uniform",
         "wina": "wina:density={},allocation=uniform",
         "wina without rotation": "wina:density={},rotate=off,allocation=uniform"}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured; a record made with another plan is not continued."""

    densities: tuple[float, ...] = DENSITIES
    windows: int = 16
    window: int = 256
    held_out: int = 40_000
    prompt: int = 32
    tokens: int = 24
    rounds: int = 7


class Bench:
    """The model with its text, in float32."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def on(self) -> Any:
        """SmolLM2 and its tokenizer."""
        return subject()

    def data(self, model: nn.Module) -> list[Tensor]:
        """Windows of text to calibrate with; random tokens for a model without a tokenizer."""
        shape = (self.plan.windows, self.plan.window)
        if model is self.on.model or model.config.vocab_size == self.on.model.config.vocab_size:
            ids = self.on.ids(calibration_text()[: 1 << 20])
            return list(ids[: shape[0] * shape[1]].reshape(shape).split(4))
        seeded = torch.Generator().manual_seed(0)
        return [torch.randint(model.config.vocab_size, (1, shape[1]), generator=seeded)]

    def bits(self) -> float:
        """Of the model as it is."""
        text = heldout_text()[: self.plan.held_out]
        return bits_per_byte(self.on.model, text, window=512, encode=self.on.encode)

    def quality(self, method: str) -> dict[str, Any]:
        """Of a method, in float32, by masks."""
        if method == "dense":
            return {"bits_per_byte": self.bits()}
        start = time.process_time()
        plan = gs.calibrate_activations(self.on.model, method, self.data(self.on.model))
        seconds = time.process_time() - start
        with gs.sparsify_activations(
            self.on.model, plan, self.data(self.on.model), simulate=True, prefill="sparse"
        ) as run:
            bits = self.bits()
        told = run.result
        return {
            "bits_per_byte": bits,
            "loss": told.loss,
            "density": told.density,
            "bytes_of_dense": told.bytes / told.dense_bytes,
            "added_bytes_of_dense": told.added_bytes / told.dense_bytes,
            "calibration_seconds": seconds,
            "density_by_layer": {
                x.name: round(x.density, 4) for x in told.layers if x.density is not None
            },
        }

    def speed(self, dense: nn.Module, name: str, bits: int | None) -> dict[str, Any]:
        """Every density in turns with the dense model, which is in bfloat16."""
        models: dict[str, nn.Module] = {"dense": dense}
        checks = {}
        for density in self.plan.densities:
            method = SPEED[name].format(density)
            plan = gs.calibrate_activations(dense, method, self.data(dense))
            made = copy.deepcopy(dense)
            exclude = ["lm_head"] if bits else []
            packed = gs.compress(made, activations=plan, latency="rule", bits=bits, exclude=exclude)
            models[f"{density:g}"] = packed.model
            checks[f"{density:g}"] = self.off(dense, plan, packed.model)
            del plan
            gc.collect()
        if bits:
            integers = gs.compress(copy.deepcopy(dense), bits=bits, exclude=["lm_head"])
            models["dense"] = integers.model
        return self.timed(models, dense, checks)

    def off(self, dense: nn.Module, plan: gs.ActivationPlan, packed: nn.Module) -> float:
        """How far a packed model's logits are from the masked dense model's, for one token."""
        ids = self.data(dense)[0][:1, : self.plan.prompt]
        with torch.no_grad():
            found = self.step(packed, ids)
            with gs.sparsify_activations(dense, plan, simulate=True):
                want = self.step(dense, ids)
        return float((found - want).norm() / want.norm())

    @staticmethod
    def step(model: Any, ids: Tensor) -> Tensor:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        found: Tensor = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits.float()
        return found

    def timed(
        self, models: dict[str, nn.Module], dense: nn.Module, checks: dict[str, float]
    ) -> dict[str, Any]:
        """Median seconds of a token of each model, in turns."""
        seconds: dict[str, list[float]] = {name: [] for name in models}
        compiled = []
        ids = self.data(dense)[0][:1, : self.plan.prompt]
        with torch.no_grad():
            for turn in range(self.plan.rounds + 1):
                for name, model in models.items():
                    taken = self.decode(model, ids)
                    if turn:
                        seconds[name].append(taken)
                if turn:
                    compiled.append(self.decode_compiled(models["dense"], ids))
        found: dict[str, Any] = {"dense_compiled": statistics.median(compiled)}
        base = statistics.median(seconds["dense"])
        most = bytes_of(models["dense"])
        for name, model in models.items():
            taken = statistics.median(seconds[name])
            read = bytes_of(model)
            gain, allowed = base / taken, most / read
            found[name] = {
                "seconds": taken, "tokens_per_second": 1 / taken, "gain": gain, "bytes": read,
                "allowed_by_bytes": allowed, "of_bytes": gain / allowed,
                "density": density_of(model), "logits_off": checks.get(name),
            }  # fmt: skip
        return found

    def decode(self, model: Any, ids: Tensor) -> float:
        """Seconds of one token, after the prompt."""
        output = model(ids, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(self.plan.tokens):
            output = model(token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) / self.plan.tokens

    def decode_compiled(self, model: nn.Module, ids: Tensor) -> float:
        decoder = Decoder(model, self.plan.prompt + self.plan.tokens + 1)
        token = int(decoder.prefill(ids).argmax())
        start = time.perf_counter()
        for _ in range(self.plan.tokens):
            token = int(decoder.step(token).argmax())
        return (time.perf_counter() - start) / self.plan.tokens


def bytes_of(model: nn.Module) -> int:
    """Of weights that one token reads: linear layers, the head among them, without embeddings."""
    total = 0
    for module in model.modules():
        if isinstance(module, ActiveLinear):
            counts = module.active.counts
            share = counts.kept / max(1, counts.tokens * module.in_features)
            total += round(share * module.values.nbytes) + module.nbytes - module.values.nbytes
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
        elif isinstance(module, QuantizedLinear):
            total += module.matrix.nbytes
    return total


def density_of(model: nn.Module) -> float | None:
    """Kept inputs by weights, over the layers that choose."""
    layers = [m for m in model.modules() if isinstance(m, ActiveLinear)]
    if not layers:
        return None
    shares = [x.active.counts.kept / max(1, x.active.counts.tokens * x.in_features) for x in layers]
    sizes = [x.values.numel() for x in layers]
    return sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes)


def geometry() -> nn.Module:
    """A Llama of 1.1 billion random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def parts(plan: Plan) -> list[str]:
    """What is measured, by name."""
    quality = [
        f"quality: {method.format(density)}"
        for method in QUALITY.values()
        for density in plan.densities
    ]
    speed = [f"speed: smollm2 {kind} {name}" for kind in ("bfloat16", "int8") for name in SPEED]
    return [
        "quality: dense",
        *quality,
        *speed,
        "speed: 1.1b bfloat16 teal",
        "speed: 1.1b int8 teal",
    ]


def measure(bench: Bench, part: str) -> dict[str, Any]:
    """One part."""
    what, name = part.split(": ", 1)
    if what == "quality":
        return bench.quality(name)
    model, kind, method = name.split(" ", 2)
    dense = geometry() if model == "1.1b" else subject(torch.bfloat16).model
    return bench.speed(dense, method, 8 if kind == "int8" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = Plan()
    record: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, SiLU; quality in float32",
        "kernel": kernel_name(),
        "metric": "bits per byte, lower is better; seconds of one token, medians of rounds in turns",
        "plan": json.loads(json.dumps(asdict(plan))),
        "machine": machine(),
        "parts": {},
    }
    if args.out.exists():
        old = json.loads(args.out.read_text())
        record["parts"] = old["parts"] if old["plan"] == record["plan"] else {}
    bench = Bench(plan)
    for part in parts(plan):
        if part in record["parts"] or args.only not in part:
            continue
        print(part, file=sys.stderr, flush=True)
        record["parts"][part] = measure(bench, part)
        gc.collect()
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
