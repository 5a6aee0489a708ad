"""Dense integer engines that users could run instead: torch's and onnxruntime's.

As in `baselines`: y = x W^T for x (batch, in) float32 and W (out, in); inputs are rounded to 8 bits on
the way, weights beforehand. Each returns a call, or None where it is not installed or not built.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.bench.baselines import Run, onnx_options

BLOCK = 128
"""Inputs that share a scale in other engines' 4-bit weights, as in ours."""


def torch_int8(weights: list[Tensor], x: Tensor, engine: str) -> Run | None:
    """torch's dynamically quantised linear, one scale per row; engine: fbgemm or onednn."""
    if engine not in torch.backends.quantized.supported_engines:
        return None
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that torchao will take over
            packed = [torch.ops.quantized.linear_prepack(_per_row(w), None) for w in weights]
    finally:
        torch.backends.quantized.engine = before
    copies = itertools.cycle(packed)
    return lambda: torch.ops.quantized.linear_dynamic(x, next(copies), False)


def _per_row(weight: Tensor) -> Tensor:
    scales = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    return torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)


def torch_int4(weights: list[Tensor], x: Tensor) -> Run | None:
    """torch's product with 4-bit weights, a scale per `BLOCK` inputs; x in bfloat16, its fastest."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") or weights[0].shape[0] % 16:
        return None
    packed = []
    for weight in weights:
        rounded, scales = _four_bits(weight)
        kept = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.flatten(1).int(), 1)
        ends = torch.stack([scales.t(), torch.zeros_like(scales.t())], dim=-1)
        packed.append((kept, ends.bfloat16().contiguous()))
    copies, inputs = itertools.cycle(packed), _in_blocks(x).flatten(1).bfloat16()

    def run() -> Tensor:
        kept, ends = next(copies)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, kept, BLOCK, ends)
        return product

    return run


def _in_blocks(matrix: Tensor) -> Tensor:
    """(rows, blocks, BLOCK), zeros beyond the columns."""
    padded = functional.pad(matrix.float(), (0, -matrix.shape[1] % BLOCK))
    return padded.reshape(matrix.shape[0], -1, BLOCK)


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 0 to 15, 8 for 0, uint8 (out, blocks, BLOCK), and scales (out, blocks)."""
    blocks = _in_blocks(weight)
    scales = blocks.abs().amax(dim=-1).clamp_min(1e-12) / 7
    return (torch.round(blocks / scales.unsqueeze(-1)) + 8).to(torch.uint8), scales


def onnx_int8(weights: list[Tensor], x: Tensor) -> Run | None:
    """onnxruntime's DynamicQuantizeMatMul, one scale per row of the weight."""
    if not _installed():
        return None
    parts = []
    for weight in weights:
        scales = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        rounded = torch.round(weight.float() / scales.unsqueeze(1)).to(torch.int8)
        parts.append({"w": rounded.t().contiguous(), "scale": scales})
    return _run("DynamicQuantizeMatMul", parts, x, weights[0].shape[0], {})


def onnx_int4(weights: list[Tensor], x: Tensor) -> Run | None:
    """onnxruntime's MatMulNBits with 4 bits, a scale per `BLOCK` inputs, 8-bit arithmetic."""
    if not _installed():
        return None
    parts = []
    out, inputs = weights[0].shape
    for weight in weights:
        rounded, scales = _four_bits(weight)
        packed = rounded[..., ::2] | rounded[..., 1::2] << 4
        parts.append({"w": packed, "scale": scales.flatten()})
    facts = {"K": inputs, "N": out, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    return _run("MatMulNBits", parts, x, out, facts)


def _run(
    operator: str, parts: list[dict[str, Tensor]], x: Tensor, out: int, facts: dict[str, int]
) -> Run:
    onnx, onnxruntime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    options = onnx_options(onnxruntime)
    sessions: list[Any] = []
    for weights in parts:
        helper, kind = onnx.helper, onnx.TensorProto.FLOAT
        node = helper.make_node(operator, ["x", *weights], ["y"], domain="com.microsoft", **facts)
        stored = [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()]
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", kind, list(x.shape))],
            [helper.make_tensor_value_info("y", kind, [x.shape[0], out])],
            stored,
        )
        sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=8)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    copies, inputs = itertools.cycle(sessions), {"x": x.numpy()}
    return lambda: torch.from_numpy(next(copies).run(None, inputs)[0])


def _installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
