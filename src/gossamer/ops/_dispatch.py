"""Which implementation serves the compiled operations on this machine, and why."""

from __future__ import annotations

import functools
import importlib
import os
import platform
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gossamer.core.errors import UsageError

ISAS = ("portable", "avx2", "avx512")


@functools.cache
def _found() -> ModuleType | str:
    """The compiled module, or why there is none. torch comes first: its libgomp serves."""
    assert torch.__version__
    try:
        return importlib.import_module("gossamer._kernels")
    except ModuleNotFoundError:
        return "the compiled kernels were not built (pip install with a C++ compiler)"
    except ImportError as error:
        return f"the compiled kernels cannot be loaded ({error})"


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled module, or None where it was not built or cannot be loaded."""
    found = _found()
    return None if isinstance(found, str) else found


def compiled() -> Any:
    """The compiled module, where it is known to be there."""
    module = kernels()
    assert module is not None
    return module


@functools.cache
def _best() -> int:
    module = kernels()
    return module.best_isa() if module else -1


def isa() -> str:
    """`avx512`, `avx2`, `portable`, or `reference` where nothing is compiled.

    The best that the processor has, unless the environment's GOSSAMER_ISA names another. Raises
    UsageError when that one is unknown or not to be had here.
    """
    wanted = os.environ.get("GOSSAMER_ISA", "").strip().lower()
    best = _best()
    if not wanted:
        return ISAS[best] if best >= 0 else "reference"
    if wanted == "reference":
        return wanted
    if wanted not in ISAS:
        raise UsageError(f"GOSSAMER_ISA={wanted!r} is none of {', '.join(ISAS)}, reference")
    if ISAS.index(wanted) > best:
        have = ", ".join(ISAS[: best + 1]) or "no compiled kernels"
        raise UsageError(f"GOSSAMER_ISA={wanted} cannot run here; this machine has {have}")
    return wanted


def isa_index() -> int:
    """The number by which the compiled module knows `isa()`; -1 for the reference."""
    if "GOSSAMER_ISA" not in os.environ:
        return _best()
    name = isa()
    return -1 if name == "reference" else ISAS.index(name)


def backend(reference: ModuleType, native: ModuleType) -> ModuleType:
    """The one of an operation's two implementations that serves here."""
    return reference if isa_index() < 0 else native


def direct(*inputs: Tensor | None) -> bool:
    """Whether the registered operator can be left out, which costs 50 us a call.

    It is there for gradients and for those who trace.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    wanted = any(part is not None and part.requires_grad for part in inputs)
    return not (wanted and torch.is_grad_enabled())


def transformed() -> bool:
    """Whether torch.func (vmap, jvp, grad) or forward-mode differentiation is at work.

    Both follow torch's own operations only. While compiling, the operators' own rules serve.
    """
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or forward_ad._current_level >= 0


def plain(x: Tensor) -> bool:
    """Whether an ordinary call is at work: nothing traces, transforms or casts it."""
    watched = is_tracing() or torch.compiler.is_compiling() or transformed()
    return x.is_cpu and not watched and not torch.is_autocast_enabled(x.device.type)


def owned(result: Tensor) -> Tensor:
    """The result of a registered operator as a tensor of its own, no view: callers may write into
    it in place, as into the result of torch's operators. Nothing is copied."""
    if not result._is_view():
        return result
    return torch.ops.aten._unsafe_view.default(result, list(result.shape))


def refuse_tracing() -> None:
    """Raise UsageError inside torch.jit.trace and exporters, which do not see what kernels write."""
    if is_tracing():
        raise UsageError(
            "torch.jit.trace, and torch.onnx.export with dynamo=False, cannot record packed "
            "layers: call gossamer.unpack(model) first, which makes them ordinary layers again, "
            "or use torch.export"
        )
    if torch.onnx.is_in_onnx_export():
        raise UsageError(
            "ONNX has no operator for packed layers: call gossamer.unpack(model) first, which makes "
            "them ordinary layers again"
        )


def describe() -> str:
    """One line: what runs, and why not better."""
    found = _found()
    if isinstance(found, str):
        return f"reference: {found}"
    best = ISAS[found.best_isa()]
    name = isa()
    if name != best:
        return f"{name}: forced by GOSSAMER_ISA; this processor has {best}"
    if name == "portable":
        return f"portable: there are no vector kernels for this {platform.machine()} processor"
    return f"{name}: the best this processor has"


def shortfall() -> str | None:
    """What a user must know where no vector kernels run, in one line; None where they do.

    Also None where GOSSAMER_ISA asks for less than the processor has.
    """
    if isa() not in ("portable", "reference") or os.environ.get("GOSSAMER_ISA", "").strip():
        return None
    return f"{describe()}; zeros save memory here, but little or no time"


def processor() -> dict[str, str | bool]:
    """Which processor this is: its name, and whether it has the dot products that speeds hang on.

    Clouds sell several generations under one name, so the name ends in family and model where the
    system tells them. bfloat16_dot, int8_dot: instructions that multiply such numbers and sum them
    in 32 bits; left out where the system does not list its instructions.
    """
    facts = _cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name = f"{name} (family {facts['cpu family']}, model {facts['model']})"
    found: dict[str, str | bool] = {"cpu": name}
    if flags := set((facts.get("flags") or facts.get("Features") or "").split()):
        found["bfloat16_dot"] = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
        found["int8_dot"] = bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
    return found


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core."""
    if not os.path.exists("/proc/cpuinfo"):
        return {}
    with open("/proc/cpuinfo") as file:
        block = file.read().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
