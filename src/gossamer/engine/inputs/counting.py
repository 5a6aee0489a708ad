"""What a call of attention computes and reads, counted from its layout; and what choosing costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gossamer.core.attention import AttentionCall
from gossamer.ops.attention import Layout, counting

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Floating-point operations, two for a multiply-add, and bytes."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def pairs(layout: Layout, call: AttentionCall) -> int:
    """How many pairs all batches and heads compute."""
    copies = call.query.shape[0] * call.query.shape[1] // counting.lists(layout)
    return counting.pairs(layout, call.causal) * copies


def possible_pairs(call: AttentionCall) -> int:
    """How many pairs all batches and heads may compute."""
    each = call.queries * call.keys
    if call.causal:
        each = call.queries * call.past + call.queries * (call.queries + 1) // 2
    return each * call.query.shape[0] * call.query.shape[1]


def executed(layout: Layout, call: AttentionCall, count: int) -> Work:
    """What the executor does for `count` pairs: two products, and the keys and values that each
    block of queries reads."""
    widths = call.query.shape[3] + call.value.shape[3]
    read = layout.blocks.numel() * layout.columns
    read += 0 if layout.tokens is None else layout.tokens.numel()
    copies = call.query.shape[0] * call.query.shape[1] // counting.lists(layout)
    return Work(2 * widths * count, read * copies * widths * call.key.element_size())


def full_layout(call: AttentionCall, block: int = 64) -> Layout:
    """Every pair that may be attended, one layout for all heads."""
    possible = call.possible_blocks(block, block)
    return Layout.from_blocks(possible, call.queries, call.keys, block, block)


def worked(function: Callable[[], T]) -> tuple[T, Work]:
    """What a function returns, and what torch's operators did in it: the operations of products,
    and the bytes that all operators read and wrote."""
    with _Counter() as counter:
        found = function()
    return found, Work(counter.flops, counter.bytes)


class _Counter(TorchDispatchMode):
    """Sums up the work of every operator that makes or reads memory."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops += int(counted(*args, **kwargs, out_val=found))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, found))
            self.bytes += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        return found
