"""A Llama geometry of 1.1 billion parameters (random weights): memory, speed and exactness.

Compresses at 50% in bfloat16 and compares greedy decoding with the same model under plain
transformers in the same process; then checks, in float32, that 32 greedy steps of the compressed
model give the tokens of the masked dense model. Writes benchmarks/results/llama_1b.json.
Run: python benchmarks/cases/llama_1b.py [--layers 22]
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer as gs
from gossamer.bench.measure import measure_limits
from gossamer.engine.measure.evaluate import decode_speed
from gossamer.engine.serve.generate import generate
from gossamer.nn import BitmapLinear
from gossamer.nn.kernel_choice.machine import machine

OUT = Path(__file__).parents[1] / "results" / "llama_1b.json"


def build(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def speed(layers: int, repeats: int) -> dict[str, object]:
    dense = build(layers, torch.bfloat16)
    sparse = build(layers, torch.bfloat16)
    gs.prune(sparse, gs.weights.Magnitude(), density=0.5)
    result = gs.compress(sparse)
    kernels = sorted({str(layer.kernel) for layer in result.layers})
    ids = torch.randint(0, 32000, (1, 16), generator=torch.Generator().manual_seed(1))
    timing = decode_speed(dense, sparse, ids, new_tokens=16, repeats=repeats)
    packed = [m for m in sparse.modules() if isinstance(m, BitmapLinear)]
    nbytes = sum(m.values.nbytes + m.bitmap.nbytes for m in packed) + sparse.lm_head.weight.nbytes
    limits = measure_limits()
    return {
        "kernels": kernels,
        "isa": result.isa,
        "decode": timing,
        "bytes_per_token": nbytes,
        "read_bytes_per_second": limits.read,
        "fraction_of_read_limit": timing.sparse * nbytes / limits.read,
    }


def exact(layers: int, steps: int = 32) -> bool:
    model = build(layers, torch.float32)
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    ids = torch.randint(0, 32000, (1, 16), generator=torch.Generator().manual_seed(1))
    masked = generate(model, ids, max_new_tokens=steps)
    gs.compress(model)
    return torch.equal(masked, generate(model, ids, max_new_tokens=steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    record = {
        "geometry": f"Llama, {args.layers} layers, hidden 2048, random weights",
        "bf16": speed(args.layers, args.repeats),
        "same_tokens_float32_32_steps": exact(args.layers),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "machine": machine(),
    }
    OUT.write_text(json.dumps(record, indent=2, default=lambda value: vars(value)) + "\n")
    print(json.dumps(record, indent=2, default=lambda value: vars(value)))


if __name__ == "__main__":
    main()
