"""Suite `attention`: chosen tiles of a long context, forward and backward, and decoding.

The engines are those at hand for dense attention: torch's own, flex_attention compiled, and
onnxruntime's fused operator. `of_ideal` is the time of the fastest of them times the measured
density, over ours: 1 where exactly the work that was left out is saved.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.bench.attention_case import DTYPES, Calls, Case, check, inputs
from gossamer.bench.attention_decode import chosen, tiled
from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.ops import _dispatch
from gossamer.ops.attention import Layout, attention


def cases() -> list[Case]:
    """16k tokens at 12% of the blocks of 64; decoding over 32k keys at 1/16, and over 8k in tiles."""
    found = []
    for backward, dtype, width, causal in itertools.product(
        (False, True), DTYPES, (64, 128), (False, True)
    ):
        name = f"{'backward' if backward else 'forward'} 16384 tokens width {width} {dtype}"
        name += " causal" if causal else ""
        found.append(Case(name, 16384, width, dtype, 0.12, 2, 2, causal, backward))
    for dtype, heads, page in itertools.product(DTYPES, (8, 32), (1, 16)):
        name = f"decoding 32768 keys width 128 {dtype} heads {heads}/8 pages of {page}"
        found.append(Case(name, 32768, 128, dtype, 1 / 16, heads, 8, page=page))
        chooser = "quest" if page > 1 else "doublesparsity"
        name = f"{name}, chosen by {chooser}"
        found.append(Case(name, 32768, 128, dtype, 1 / 16, heads, 8, page=page, chooser=chooser))
    for dtype, (heads, kv_heads, width), kept in itertools.product(
        DTYPES, ((9, 3, 64), (32, 8, 128)), (0.5, 0.3)
    ):
        name = f"decoding 8192 keys width {width} {dtype} heads {heads}/{kv_heads} tiles of {kept}"
        found.append(Case(name, 8192, width, dtype, 1.0, heads, kv_heads, kept=kept))
    return found


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Times of ours and of dense engines; raises GossamerError where a result is wrong."""
    if case.kept:
        return tiled(case, limits, rounds)
    if case.page:
        return chosen(case, limits, rounds)
    query, key, value = (part.requires_grad_(case.backward) for part in inputs(case, case.keys))
    layout = _layout(case)
    density = layout.density(causal=case.causal)
    exact = attention(query.double(), key.double(), value.double(), layout, causal=case.causal)[0]
    ours = attention(query, key, value, layout, causal=case.causal)[0]
    check(case, "gossamer", ours, exact)
    products, call = 2, lambda: attention(query, key, value, layout, causal=case.causal)[0]
    dense = _dense(case, query, key, value)
    calls: Calls = {"gossamer": call, **dense}
    if case.backward:
        products = 5
        calls = _gradients(case, {"gossamer": ours, "sdpa dense": dense["sdpa dense"]()}, exact,
                           (query, key, value))  # fmt: skip
    else:
        expected = dense["sdpa dense"]()
        for name, other in dense.items():
            check(case, name, other(), expected)
    with torch.set_grad_enabled(case.backward):
        turns = interleaved(calls, rounds)
    pairs = density * case.heads * case.keys * (case.keys + case.causal) / (1 + case.causal)
    record = turns.record(case, limits.seconds(0, _flops(case, 2 * products * pairs * case.width)))
    return {**record, "density": density, "of_ideal": record["ratio"] * density}


def _flops(case: Case, flops: float) -> float:
    """In units of float32: dot products of bfloat16 do two in one."""
    dots = case.dtype == "bfloat16" and bool(_dispatch.processor().get("bfloat16_dot"))
    return flops / 2 if dots else flops


def _layout(case: Case) -> Layout:
    """Random blocks of 64, and those on the diagonal, so that no query is without keys."""
    blocks = -(-case.keys // 64)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(1, case.heads, blocks, blocks, generator=generator) < case.density
    return Layout.from_blocks(mask | torch.eye(blocks, dtype=torch.bool), case.keys, case.keys)


def _dense(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Calls:
    found: dict[str, Callable[[], Tensor] | None] = {
        "sdpa dense": lambda: functional.scaled_dot_product_attention(
            query, key, value, is_causal=case.causal
        )
    }
    if not case.backward:  # neither has a backward pass on the CPU
        found["flex_attention dense"] = _flex(case, query, key, value)
        found["onnxruntime dense"] = _onnx(case, query, key, value)
    return {name: call for name, call in found.items() if call is not None}


def _flex(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor] | None:
    """Compiled; None where there is no compiler."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    mask = None
    if case.causal:
        mask = flex.create_block_mask(
            lambda b, h, q, k: q >= k, None, None, case.keys, case.keys, device="cpu"
        )
    compiled = torch.compile(flex.flex_attention)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(query, key, value, block_mask=mask)
    except Exception:  # whatever a compiler that is missing or cannot do it raises
        return None
    return lambda: compiled(query, key, value, block_mask=mask)


def _onnx(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor] | None:
    """onnxruntime's MultiHeadAttention, which is fused where it is neither causal nor bfloat16."""
    absent = not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
    if absent or case.causal or case.dtype != "float32":
        return None
    onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    make, names, size = onnx.helper, ["query", "key", "value"], case.heads * case.width
    node = make.make_node(
        "MultiHeadAttention", names, ["output"], domain="com.microsoft", num_heads=case.heads
    )
    kind, shape = onnx.TensorProto.FLOAT, [1, case.keys, size]
    values = [make.make_tensor_value_info(name, kind, shape) for name in [*names, "output"]]
    graph = make.make_graph([node], "attention", values[:3], values[3:])
    versions = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=versions, ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options)
    parts = [x.transpose(1, 2).reshape(shape).contiguous().numpy() for x in (query, key, value)]
    inputs = dict(zip(names, parts, strict=True))

    def call() -> Tensor:
        output = torch.from_numpy(session.run(None, inputs)[0])
        return output.reshape(1, case.keys, case.heads, case.width).transpose(1, 2)

    return call


def _gradients(
    case: Case, outputs: dict[str, Tensor], exact: Tensor, wanted: tuple[Tensor, Tensor, Tensor]
) -> Calls:
    """Backward passes, of ours checked against float64."""
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))

    def of(output: Tensor) -> tuple[Tensor, ...]:
        seed = grad.to(output.dtype)
        return torch.autograd.grad(output, wanted, seed, retain_graph=True)

    for name, found, expected in zip(["query", "key", "value"], of(outputs["gossamer"]), of(exact),
                                     strict=True):  # fmt: skip
        check(case, f"gossamer's gradient of {name}", found, expected)
    return {
        name: functools.partial(lambda output: of(output)[0], output)
        for name, output in outputs.items()
    }
