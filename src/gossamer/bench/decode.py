"""Suite `decode`: greedy decoding of a real model's geometry with random weights, batch 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gossamer.bench.measure import Limits
from gossamer.core.errors import MissingExtra, UsageError
from gossamer.core.pattern import Unstructured
from gossamer.core.select import select
from gossamer.engine.measure.evaluate import decode_speed
from gossamer.engine.serve.compress import compress
from gossamer.nn.packed.bitmap import BitmapLinear


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama architecture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int


GEOMETRIES = {
    "llama-1b": Geometry(2048, 22, 32, 4, 5632, 32000),
    "llama-160m": Geometry(768, 12, 12, 12, 3072, 32000),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Random weights in the geometry; seed 0."""
    if name not in GEOMETRIES:
        raise UsageError(f"--geometry is one of {', '.join(GEOMETRIES)}, not {name!r}")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    g = GEOMETRIES[name]
    config = LlamaConfig(
        vocab_size=g.vocab,
        hidden_size=g.hidden,
        intermediate_size=g.inner,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def measure(geometry: str, density: float, limits: Limits, repeats: int = 5) -> dict[str, Any]:
    """Tokens per second: transformers in bfloat16, the compiled loop dense, and sparse."""
    dense, sparse = build(geometry, torch.bfloat16), build(geometry, torch.bfloat16)
    for name, module in sparse.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            support = select(module.weight.detach().float().abs(), Unstructured("row"), density)
            module.weight.data *= support.mask
    result = compress(sparse, latency="rule")
    ids = torch.randint(0, 32000, (1, 16), generator=torch.Generator().manual_seed(1))
    speed = decode_speed(dense, sparse, ids, new_tokens=16, repeats=repeats)
    packed = [m for m in sparse.modules() if isinstance(m, BitmapLinear)]
    head: Any = sparse.get_submodule("lm_head")
    nbytes = sum(m.values.nbytes + m.bitmap.nbytes for m in packed) + head.weight.nbytes
    return {
        "case": {"geometry": geometry, "dtype": "bfloat16", "density": density, "batch": 1},
        "tokens_per_second": {
            "transformers dense bfloat16": speed.dense,
            "gossamer dense bfloat16": speed.dense_compiled,
            "gossamer": speed.sparse,
        },
        "loop": speed.loop,
        "ratio": speed.ratio,
        "ratio_to_our_dense": speed.sparse / speed.dense_compiled if speed.dense_compiled else None,
        "fraction_of_limit": speed.sparse * limits.seconds(nbytes, 0.0)[0],
        "limit": "bytes",
        "kernels": sorted({str(layer.kernel) for layer in result.layers}),
    }
