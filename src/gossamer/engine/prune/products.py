"""What really multiplies a weight: seen in the products that the model computes, not guessed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.core.matrix import Weight

Seen = Callable[[str, Tensor, bool], None]
"""Called with a weight's name, the rows (count, in) that it multiplies, and whether it lies as
(in, out)."""


@contextmanager
def observe_products(weights: Mapping[str, Weight], seen: Seen) -> Iterator[None]:
    """While open, call `seen` at every matrix product in which one of the weights is an operand.

    Views, transposes and row slices of a parameter are recognised by their memory, and so are
    experts that were picked by their numbers. Other copies, as a cast makes them, are not.
    """
    if not weights:
        yield
        return
    with _Products(weights, seen):
        yield


@contextmanager
def unfused(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without compiled graphs, torch's fused encoder layers and, for recurrent layers, oneDNN and
    cuDNN.

    A fused layer computes its products where nobody can see them. The results are the same.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in modules):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class _Products(TorchDispatchMode):
    def __init__(self, weights: Mapping[str, Weight], seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._at: dict[int, list[tuple[str, Tensor]]] = {}
        self._stacks: dict[int, dict[int, str]] = {}
        """By memory, the experts that a parameter stacks."""
        self._picked: deque[_Picked] = deque(maxlen=2)
        for name, weight in weights.items():
            tensor = weight.tensor
            if tensor.dim() == 2:
                self._at.setdefault(_memory(tensor), []).append((name, tensor))
            if isinstance(weight.part, int):
                self._stacks.setdefault(_memory(tensor), {})[weight.part] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        products = _PRODUCTS.get(str(func))
        if products is not None:
            found: dict[tuple[str, bool], list[Tensor]] = {}
            for rows, matrix in products(self._watches, *args):
                for use in self._uses(matrix):
                    found.setdefault(use, []).append(rows)
            for (name, flipped), parts in found.items():
                rows = torch.cat(parts).detach() if len(parts) > 1 else parts[0].detach()
                if rows.numel():
                    self._seen(name, rows, flipped)
        output = func(*args, **(kwargs or {}))
        if str(func) in ("aten.index.Tensor", "aten.index_select.default"):
            self._pick(args, output)
        return output

    def _watches(self, tensor: Tensor) -> bool:
        memory = _memory(tensor)
        return memory in self._at or any(memory == _memory(each.copy) for each in self._picked)

    def _uses(self, matrix: Tensor) -> Iterator[tuple[str, bool]]:
        """The weights that an (in, out) matrix holds, and whether they lie so."""
        memory = _memory(matrix)
        for name, tensor in self._at.get(memory, ()):
            flipped = _covers(matrix, tensor)
            if flipped is not None:
                yield name, flipped
        for picked in self._picked:
            if memory == _memory(picked.copy):
                yield from picked.uses(matrix)

    def _pick(self, args: tuple[Any, ...], output: Tensor) -> None:
        """Remember a copy of experts that was picked by their numbers, one for each token."""
        names = self._stacks.get(_memory(args[0]))
        index = args[2] if len(args) > 2 else args[1]
        index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
        if names is None or not isinstance(index, Tensor) or index.dtype == torch.bool:
            return
        if args[0].dim() == 3 and output.is_contiguous():
            numbers = index.reshape(-1).tolist()
            self._picked.append(_Picked(output, [names.get(number) for number in numbers]))


@dataclass(frozen=True, eq=False)
class _Picked:
    """Experts that were copied side by side, (..., rows, columns), and their names in order."""

    copy: Tensor
    names: list[str | None]

    def uses(self, matrix: Tensor) -> Iterator[tuple[str, bool]]:
        """The experts that an (in, out) matrix holds, and whether they lie so."""
        shape = self.copy.shape[-2:]
        size = shape[0] * shape[1]
        first = int(matrix.storage_offset()) - int(self.copy.storage_offset())
        one = self.copy.reshape(-1, *shape)[0]
        flipped = matrix.shape == shape and _same_layout(matrix, one)
        rows = matrix if flipped else matrix.t()
        if not _same_layout(rows, one) or rows.shape[1] != shape[1]:
            return
        if first % size or rows.shape[0] % shape[0]:
            return
        for name in self.names[first // size : first // size + rows.shape[0] // shape[0]]:
            if name is not None:
                yield name, flipped


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _covers(matrix: Tensor, weight: Tensor) -> bool | None:
    """Whether (in, out) `matrix` is a weight as it lies: True; transposed: False; neither: None.

    Transposed, `matrix` may hold rows of other weights before and after it.
    """
    if _same_layout(matrix, weight) and matrix.shape == weight.shape:
        return True if matrix.storage_offset() == weight.storage_offset() else None
    rows = matrix.t()
    if rows.shape[1] != weight.shape[1] or not _same_layout(rows, weight):
        return None
    before = int(weight.storage_offset()) - int(rows.storage_offset())
    step = int(rows.stride(0)) if rows.shape[0] > 1 else max(1, weight.shape[1])
    first, rest = divmod(before, step)
    return False if not rest and 0 <= first <= rows.shape[0] - weight.shape[0] else None


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether strides agree along every axis that has more than one place."""
    return all(
        a.stride(axis) == b.stride(axis) for axis in (0, 1) if min(a.shape[axis], b.shape[axis]) > 1
    )


Pairs = Iterator[tuple[Tensor, Tensor]]
"""(rows, matrix): rows (count, in) multiply a matrix (in, out) that may be a weight."""

Watches = Callable[[Tensor], bool]


def _mm(watches: Watches, a: Tensor, b: Tensor, *_: Any) -> Pairs:
    if watches(b):
        yield a, b
    if watches(a):
        yield b.t(), a.t()


def _mv(watches: Watches, a: Tensor, b: Tensor, *_: Any) -> Pairs:
    yield from _mm(watches, a, b.unsqueeze(1))


def _bmm(watches: Watches, a: Tensor, b: Tensor, *_: Any) -> Pairs:
    if watches(b) and b.stride(0) == 0:  # one matrix, expanded over the batch
        yield a.reshape(-1, a.shape[-1]), b[0]
    elif watches(a) and a.stride(0) == 0:
        yield b.transpose(1, 2).reshape(-1, b.shape[1]), a[0].t()
    elif watches(a) or watches(b):
        for left, right in zip(a, b, strict=True):
            yield from _mm(watches, left, right)


def _grouped(watches: Watches, x: Tensor, weight: Tensor, ends: Any = None, *_: Any) -> Pairs:
    """Rows of x sorted by the matrix that they multiply; `ends` tells where each group ends."""
    if not watches(weight) or ends is None or x.dim() != 2 or weight.dim() != 3:
        return
    start = 0
    for index, end in enumerate(ends.tolist()):
        if end > start:
            yield x[start:end], weight[index]
        start = end


def _after_first(products: Callable[..., Pairs]) -> Callable[..., Pairs]:
    return lambda watches, _, *args: products(watches, *args)


_PRODUCTS: dict[str, Callable[..., Pairs]] = {
    "aten.mm.default": _mm,
    "aten.mm.out": _mm,
    "aten.addmm.default": _after_first(_mm),
    "aten.addmm.out": _after_first(_mm),
    "aten._addmm_activation.default": _after_first(_mm),
    "aten.mv.default": _mv,
    "aten.addmv.default": _after_first(_mv),
    "aten.bmm.default": _bmm,
    "aten.baddbmm.default": _after_first(_bmm),
    "aten.linear.default": lambda watches, x, weight, *_: _mm(
        watches, x.reshape(-1, x.shape[-1]), weight.t()
    ),
    "aten._grouped_mm.default": _grouped,
    "transformers.grouped_mm_fallback.default": _grouped,
}
