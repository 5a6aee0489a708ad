"""What users could run instead; each returns a call, or None where it is not installed.

Every baseline computes y = x W^T for x (batch, in) float32 and W (out, in), in its own best layout.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.ops._dispatch import isa_index, kernels

Run = Callable[[], Tensor]


def torch_dense(weights: list[Tensor], x: Tensor, dtype: torch.dtype) -> Run:
    """torch's own product; the weights take turns, so that they come from memory."""
    copies = itertools.cycle([w.to(dtype).clone() for w in weights])
    inputs = x.to(dtype)
    return lambda: functional.linear(inputs, next(copies))


def own_dense_bfloat16(weights: list[Tensor], x: Tensor) -> Run | None:
    """A product of our own for one row of input, where torch's bfloat16 may be slow."""
    module: Any = kernels()
    rows, cols = weights[0].shape
    if module is None or x.shape[0] != 1 or cols % 64:
        return None
    copies = itertools.cycle([w.to(torch.bfloat16).clone() for w in weights])
    inputs = x[0].float().contiguous()

    def run() -> Tensor:
        weight, y = next(copies), torch.empty(1, rows)
        module.dense_matvec(weight, inputs, y[0], torch.get_num_threads(), isa_index())
        return y.bfloat16()

    return run


def numpy_dense(weights: list[Tensor], x: Tensor) -> Run:
    """numpy's product: OpenBLAS in the usual wheels."""
    copies = itertools.cycle([w.float().numpy().T for w in weights])
    inputs = x.numpy()
    return lambda: torch.from_numpy(inputs @ next(copies))


def onnx_dense(weights: list[Tensor], x: Tensor) -> Run | None:
    """onnxruntime's float32 MatMul."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return None
    onnx, onnxruntime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))

    options = onnx_options(onnxruntime)
    sessions = []
    for weight in weights:
        helper, proto = onnx.helper, onnx.TensorProto
        stored = onnx.numpy_helper.from_array(weight.float().t().contiguous().numpy(), "w")
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "linear",
            [helper.make_tensor_value_info("x", proto.FLOAT, list(x.shape))],
            [helper.make_tensor_value_info("y", proto.FLOAT, [x.shape[0], weight.shape[0]])],
            [stored],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    copies, inputs = itertools.cycle(sessions), {"x": x.numpy()}
    return lambda: torch.from_numpy(next(copies).run(None, inputs)[0])


def torch_csr(weights: list[Tensor], x: Tensor) -> Run:
    """torch's compressed sparse rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its CSR is in beta
        copies = itertools.cycle([w.float().to_sparse_csr() for w in weights])
    inputs = x.t().contiguous()
    return lambda: torch.mm(next(copies), inputs).t()


def torch_bsr(weights: list[Tensor], x: Tensor, block: str) -> Run | None:
    """torch's compressed sparse rows of blocks, which MKL serves where these are square."""
    high, wide = map(int, block.split("x"))
    if high != wide:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its BSR is in beta
        copies = itertools.cycle([w.float().to_sparse_bsr((high, wide)) for w in weights])
    inputs = x.t().contiguous()
    return lambda: torch.mm(next(copies), inputs).t()


def scipy_csr(weights: list[Tensor], x: Tensor) -> Run | None:
    """scipy's compressed sparse rows, one thread."""
    if importlib.util.find_spec("scipy") is None:
        return None
    from scipy import sparse

    copies = itertools.cycle([sparse.csr_matrix(w.float().numpy()) for w in weights])
    inputs = x.t().contiguous().numpy()
    return lambda: torch.from_numpy(next(copies) @ inputs).t()


def onnx_options(onnxruntime: Any) -> Any:
    """torch's number of threads, which spin during a run and not after it: each session has its own,
    and those of many sessions would take the processors from whoever runs next.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
