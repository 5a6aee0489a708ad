"""Putting sparse kernels behind the layers whose zeros pay."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.matrix import as_matrix, is_prunable
from gossamer.core.result import CompressResult, LayerRecord, PruneResult, unwrap
from gossamer.engine.coverage import nonzeros
from gossamer.engine.serve.coverage import other_records, packed_coverage
from gossamer.models.layers import matching
from gossamer.nn.chain import fuse
from gossamer.nn.kernel_choice.decide import (
    FAMILIES,
    SLOWER,
    Decision,
    choose_columns,
    choose_form,
    decide,
    prepare,
)
from gossamer.nn.kernel_choice.latency import LatencyModel, Predictor
from gossamer.nn.kernel_choice.machine import choose_unpacking, known_latency
from gossamer.nn.packed.bitmap import BitmapLinear, serves_large_batches
from gossamer.nn.packed.conv import PackedConv2d, why_not
from gossamer.nn.packed.nm import NMLinear, pays_as_nm
from gossamer.nn.packed.places import put, why_not_here
from gossamer.nn.packed.quantized import QuantizedLinear
from gossamer.nn.serving import serves
from gossamer.ops import _dispatch
from gossamer.ops.bitmap import bitmap_bytes
from gossamer.ops.conv import kernel_name as conv_kernel_name
from gossamer.ops.quantized import BITS

MAX_BYTES = 0.9
"""Without measured latencies a packed weight must be at most this fraction of the dense one."""


def compress(
    model: nn.Module | PruneResult,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_density: float | None = None,
    large_batches: bool | None = None,
    strict: bool = False,
    bits: int | None = None,
    group: int = 128,
    head_bits: int = 8,
    latency: LatencyModel | Literal["rule"] | None = None,
    activations: PacksLayers | None = None,
) -> CompressResult:
    """Replace each sparse layer, in place, by one with a sparse kernel where that is faster.

    A Linear becomes a `BitmapLinear` or, pruned N:M, an `NMLinear`. A float32 Conv2d of one group
    becomes a `PackedConv2d`. 3x3 depthwise convolutions get a kernel for the same layout. A
    Sequential around convolutions becomes a `ConvChain`, which folds batch norms and ReLUs in.

    Any zeros count, whoever made them. Every matrix has a record that names its kernel, or the
    reason why it stays dense. No kernel may be faster, or serve its kind, dtype or device. Its
    weight may be tied or multiplied by its parent, or its forward its own. A packed layer keeps the
    hooks, attributes and bias of the layer that it replaces, and has a read-only `weight`.
    `gs.unpack` undoes the call.

    Where the processor or the installation has no vector kernels, the logger `gossamer` says so.

    Parameters
    ----------
    model : nn.Module or PruneResult
        Changed in place.
    include, exclude : sequence of str
        `fnmatch` patterns on dotted names: pack only layers that match, and none of these.
    max_density : float, optional
        Leave denser layers dense.
    large_batches : bool, optional
        Also keep, in memory only, a form of the weights for batch sizes above 8. It takes 3 to 4
        bytes more per kept bfloat16 weight. By default for models that do not generate text.
    strict : bool
        Raise UsageError where a layer that holds zeros, and was not left out, stays dense.
    bits : {4, 8}, optional
        Also round the weights of every untied linear layer, sparse or dense, to integers, to the
        nearest. Each becomes a `QuantizedLinear`. Measure what the rounding costs.
    group : int
        Columns that share a scale, with `bits`: a power of two from 64 on.
    head_bits : {4, 8}
        The width of a language model's output head, with `bits`.
    latency : LatencyModel or "rule", optional
        What decides. By default what `calibrate_latency` measured on this machine. Without it every
        distinct shape, density and dtype is timed, for at most three seconds in all. Models that
        generate text are judged at batch size 1, others at 128. So on a processor with bfloat16
        products an encoder in bfloat16 mostly stays dense. "rule" measures nothing: a layer is
        packed at up to 0.9 of its dense bytes, a convolution up to density 0.25. What files store
        does not depend on it.
    activations : ActivationPlan, optional
        Of `calibrate_activations`: the layers that it names become `ActiveLinear`, which reads only
        the weights of the inputs that a token keeps. Thresholds are saved with the model. With
        `bits=8` they are stored as integers. Where the dense layer is faster, it stays.

    Returns
    -------
    CompressResult
        The model, a record per matrix, and the coverage of the whole model.

    Raises
    ------
    UsageError
        For bad arguments, patterns that match nothing, and weights on the meta device. Nothing is
        changed then.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> fast = gs.compress(gs.prune(model, "magnitude", sparsity=0.8), latency="rule")
    >>> type(model[0]).__name__
    'BitmapLinear'
    """
    root = unwrap(model)
    _check(root, bits, group, head_bits)
    names = {name: name for name, module in root.named_modules() if is_prunable(module)}
    wanted = matching(include, names, root, "include") if include else set(names)
    call = _Call(
        root, wanted - matching(exclude, names, root, "exclude"), max_density,
        serves_large_batches(root, large_batches), bits, group, head_bits, known_latency(latency), _head(root),
        type(root).__name__ not in FAMILIES, _uses(root),
    )  # fmt: skip
    asked = {r.name: r for r in model.layers} if isinstance(model, PruneResult) else {}
    chosen: list[LayerRecord] = []
    if activations is not None:
        chosen = activations.pack(root, call.wanted, bits, latency != "rule")
    layers = {name: module for name, module in root.named_modules() if is_prunable(module)}
    plans = [
        (module, *_decide(name, module, asked.get(name), call))
        for name, module in layers.items()
        if not _untouched_embedding(module)
    ]
    for _, record, reason in plans if strict else ():
        if reason is not None and record.density < 1.0 and record.name in call.wanted:
            raise UsageError(f"{record.name} stays dense: {reason}")
    records = chosen + [_serve(module, record, reason, call) for module, record, reason in plans]
    coverage = packed_coverage(root, records)
    others = {record.name: record for record in other_records(root)}
    others.update((name, _depthwise_record(root, name)) for name in fuse(root))
    records += others.values()
    threads = torch.get_num_threads()
    if slow := _dispatch.shortfall():
        logging.getLogger("gossamer").warning(slow)
    return CompressResult(root, tuple(records), _dispatch.isa(), threads, coverage)


def _check(root: nn.Module, bits: int | None, group: int, head_bits: int) -> None:
    """Raise UsageError for what cannot be right, before anything changes."""
    if is_prunable(root):
        raise UsageError("the model is itself one layer; wrap it in torch.nn.Sequential")
    if bits is not None and (bits not in BITS or head_bits not in BITS):
        raise UsageError(f"bits and head_bits are 4 or 8, not {bits} and {head_bits}")
    if group < 64 or group & (group - 1):
        raise UsageError(f"group is a power of two from 64 on, not {group}")
    for name, tensor in root.named_parameters():
        if tensor.is_meta:
            raise UsageError(
                f"{name} is on the meta device, so it holds no numbers; load the weights first"
            )


class PacksLayers(Protocol):
    """What chooses layers and packs them itself, such as an `ActivationPlan`."""

    def pack(
        self, root: nn.Module, wanted: Collection[str], bits: int | None, timed: bool
    ) -> list[LayerRecord]:
        """Replace layers of the model among those wanted; a record of each that was replaced."""
        ...


@dataclass(frozen=True)
class _Call:
    """What one call of `compress` wants of every layer, and what it knows of the whole model."""

    root: nn.Module
    wanted: set[str]
    max_density: float | None
    large_batches: bool
    bits: int | None
    group: int
    head_bits: int
    latency: Predictor | None
    head: nn.Module | None
    calls: bool
    uses: Counter[int]

    def bits_of(self, module: nn.Module) -> int | None:
        """The width of the integers that the layer's weights become."""
        if self.bits is None or isinstance(module, nn.Conv2d):
            return None
        return self.head_bits if module is self.head else self.bits


def _uses(root: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    modules = root.modules()
    return Counter(id(p) for module in modules for p in module.parameters(recurse=False))


def _decide(
    name: str, module: nn.Module, asked: LayerRecord | None, call: _Call
) -> tuple[LayerRecord, str | None]:
    """The layer's record with what decided, and the reason to leave it dense, if any."""
    record, bits = _record(name, module, asked), call.bits_of(module)
    reason = _refusal(module, record, call, bits)
    if reason is not None or bits is not None:
        return record, reason
    if call.latency is not None:
        decision = decide(module, record, call.latency, call.large_batches, call.calls)
        if decision is not None:
            return _by_costs(record, decision)
    return _by_rule(module, record)


def _serve(module: nn.Module, record: LayerRecord, reason: str | None, call: _Call) -> LayerRecord:
    """Replace one layer, unless there is a reason to leave it dense."""
    if reason is not None:
        if reason.startswith(SLOWER):  # kept with the model, so that a file says it too
            module.dense_reason = reason  # type: ignore[assignment]
        return replace(record, reason=reason, sparse_bytes=record.dense_bytes)
    bits = call.bits_of(module)
    return _swap(module, record, call) if bits is None else _quantize(module, record, bits, call)


def _head(root: nn.Module) -> nn.Module | None:
    """The layer that turns a language model's states into logits."""
    asked: Any = getattr(root, "get_output_embeddings", None)
    return asked() if callable(asked) else None


def _depthwise_record(root: nn.Module, name: str) -> LayerRecord:
    """Of a convolution that stays dense, by the kernel that suits what surrounds it."""
    weight = root.get_parameter(f"{name}.weight")
    shape, density = (weight.shape[0], 9), float((weight != 0).float().mean())
    return LayerRecord(
        name, shape, density, 1.0, conv_kernel_name(None), dense_bytes=weight.nbytes,
        sparse_bytes=weight.nbytes, batch_kernel=conv_kernel_name(None),
    )  # fmt: skip


def _untouched_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and bool((module.weight != 0).all(dim=1).any())


def _record(name: str, module: nn.Module, asked: LayerRecord | None) -> LayerRecord:
    if _unknown(module):
        return LayerRecord(name, (), 1.0, 1.0)
    matrix = as_matrix(module)
    nnz, total = nonzeros(matrix), matrix.numel()
    width = matrix.element_size()
    return LayerRecord(
        name=name,
        shape=(matrix.shape[0], matrix.shape[1]),
        density=nnz / total if total else 1.0,
        requested_density=asked.requested_density if asked else (nnz / total if total else 1.0),
        pattern=asked.pattern if asked else "",
        dense_bytes=total * width,
        sparse_bytes=nnz * width + matrix.shape[0] * bitmap_bytes(matrix.shape[1]),
    )


def _unknown(module: nn.Module) -> str | None:
    """Why the numbers of a layer's weight cannot be seen; None where they can."""
    weight: Any = module.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet; run the model once first"
    data = weight.data
    return None if type(data) is Tensor else f"its weight is a {type(data).__name__}, no tensor"


def _refusal(module: nn.Module, record: LayerRecord, call: _Call, bits: int | None) -> str | None:
    weight: Any = module.weight
    if record.name not in call.wanted:
        return "left out by `include` or `exclude`"
    if (unknown := _unknown(module)) is not None:
        return unknown
    if isinstance(module, nn.Embedding):
        return "an embedding looks rows up, so zeros save no multiplication"
    if record.density == 1.0 and bits is None:
        return "no zeros"
    if weight.device.type != "cpu":
        return f"the kernels run on the CPU, the weight is on {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {weight.dtype}"
    if call.uses[id(weight)] > 1:
        return "its weight is tied to another module"
    if (reason := why_not_here(call.root, record.name, module)) is not None:
        return reason
    if bits is not None:
        return None
    if call.max_density is not None and record.density > call.max_density:
        return f"density {record.density:.2f} is above {call.max_density:.2f}"
    return why_not(module, 0.0) if isinstance(module, nn.Conv2d) else None


def _by_costs(record: LayerRecord, decision: Decision) -> tuple[LayerRecord, str | None]:
    reason = f"{SLOWER}: {decision}" if decision.chosen == "dense" else None
    decided = f"by measured latencies: {decision}"
    return replace(record, decided=decided, predicted=decision.predicted), reason


def _by_rule(module: nn.Module, record: LayerRecord) -> tuple[LayerRecord, str | None]:
    share = record.sparse_bytes / max(1, record.dense_bytes)
    if isinstance(module, nn.Conv2d):
        reason = why_not(module, record.density)
    else:
        reason = f"packed it would take {share:.2f} of the dense bytes, which does not pay"
        reason = reason if share > MAX_BYTES else None
    return replace(record, decided="by rule"), reason


def _swap(module: nn.Module, record: LayerRecord, call: _Call) -> LayerRecord:
    bias, matrix = module._parameters.get("bias"), as_matrix(module)
    exact = not isinstance(module, nn.Conv2d) and pays_as_nm(matrix, record.pattern)
    packed: BitmapLinear | NMLinear
    packed = (NMLinear if exact else BitmapLinear).from_matrix(matrix, bias, record.pattern)
    packed.requested_density = record.requested_density
    if isinstance(module, nn.Conv2d) and isinstance(packed, BitmapLinear):
        conv = PackedConv2d.from_conv(module, packed)
        put(call.root, module, conv)
        kernel, many = serves(conv)
        return replace(record, kernel=kernel, batch_kernel=many)
    if isinstance(packed, BitmapLinear):
        choose_unpacking(packed, call.latency)
        choose_columns(packed, call.latency)
    prepared = call.large_batches and prepare(packed, call.latency)
    put(call.root, module, packed)
    kernel, many = serves(packed)
    kernel += f" + {many}" if prepared else ""
    size = packed.nbytes if isinstance(packed, NMLinear) else record.sparse_bytes
    return replace(record, kernel=kernel, batch_kernel=many, sparse_bytes=size)


def _quantize(module: nn.Module, record: LayerRecord, bits: int, call: _Call) -> LayerRecord:
    bias, matrix = module._parameters.get("bias"), as_matrix(module)
    packed = QuantizedLinear.from_matrix(matrix, bias, record.pattern, bits=bits, group=call.group)
    packed.requested_density = record.requested_density
    size, density = packed.matrix.nbytes, packed.density
    choose_form(packed, call.latency, call.large_batches)
    put(call.root, module, packed)
    kernel, many = serves(packed)
    decided = f"asked for; {packed.form_decided}".removesuffix("; ")
    return replace(
        record,
        kernel=kernel,
        batch_kernel=many,
        sparse_bytes=size,
        density=density,
        decided=decided,
    )
