"""Modules whose own code multiplies the weight of a layer inside them, without calling it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_FACTS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad"})
"""What a packed layer's weight tells without being unpacked."""
_ASKED = frozenset({"isinstance", "hasattr", "id"})
_CALL_ANYWAY = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""torch's own, which read weights only for a fast path that packed weights do not take."""
_SETUP = ("init", "reset", "tie", "get_", "set_", "load", "save", "extra_repr", "cuda", "resize")
"""Parts of names of methods that run before or beside a forward on the CPU."""


def who_reads(root: nn.Module, name: str) -> str | None:
    """The class and method around `name` that reads that layer's weight; None where none does.

    Found in the code of the methods of every module around it, such as `self.out.weight @ x`.
    Reading the dtype, device or shape does not count.
    """
    *path, child = name.split(".")
    module: Any = root
    around = [root]
    for part in path:
        module = getattr(module, part)
        around.append(module)
    for parent in reversed(around):
        if isinstance(parent, nn.MultiheadAttention) and child == "out_proj":
            return "MultiheadAttention.forward"
        if type(parent) in _CALL_ANYWAY:
            continue
        for method, read in _reads(type(parent)):
            if child in read:
                return f"{type(parent).__name__}.{method}"
    return None


def _reads(kind: type) -> Iterator[tuple[str, set[str]]]:
    """Methods of a class and its bases, torch's Module excluded, with the layers that they read."""
    seen = set()
    for base in kind.__mro__:
        if base is nn.Module or not issubclass(base, nn.Module):
            continue
        for name, held in vars(base).items():
            function = inspect.unwrap(held) if callable(held) else held
            if name in seen or any(word in name for word in _SETUP):
                continue
            seen.add(name)
            if isinstance(function, FunctionType) and _mentions(function.__code__):
                yield name, _layers(function)


def _mentions(code: CodeType) -> bool:
    """Whether any weight is read, which is quickly known."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return "weight" in code.co_names or any(_mentions(each) for each in inner)


def _layers(function: FunctionType) -> set[str]:
    """Names of the layers whose weight a function reads and that it does not call as well.

    One that does both, such as Mamba's, reads for a device that is not ours. Of a function without
    source none are known.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return set()
    harmless, called = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            harmless.add(node.value)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                called.add(node.func.attr)
            elif getattr(node.func, "id", "") in _ASKED:
                harmless.update(node.args)
    return {
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in harmless
        and isinstance(node.value, ast.Attribute) and node.value.attr not in called
    }  # fmt: skip
