"""Any tensor as its non-zero numbers and a bitmap: what a file holds where that is smaller.

How a tensor is stored says nothing about what serves it in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import FormatError

VALUES, BITMAP = ":values", ":bitmap"
"""Appended to a tensor's name; no name of a module's tensor holds a colon."""
PAYS = 0.95
"""The largest fraction of the dense bytes for which a tensor is stored so."""
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _BITS}
_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Stored:
    """One tensor as the manifest describes it.

    served: it is the weight of a layer that was dense only because that was faster where the folder
    was written; where a kernel is faster, it may be served by that.
    """

    shape: tuple[int, ...]
    dtype: str
    nnz: int
    served: bool


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The non-zero numbers in order, and a bit for each place; None where that is not smaller.

    NaN counts as a number; -0.0 is a zero, and is read back as 0.0.
    """
    bits = _BITS.get(tensor.dtype)
    if bits is None or tensor.dim() < 2 or not tensor.numel():
        return None
    flat = tensor.detach().cpu().contiguous().view(-1)
    mask = (flat.view(bits) & torch.iinfo(bits).max) != 0  # by bits: denormal numbers are kept
    size = int(mask.sum()) * flat.element_size() + (flat.numel() + 7) // 8
    if size >= PAYS * flat.nbytes:
        return None
    return flat[mask], torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack(name: str, facts: Stored, values: Tensor, bitmap: Tensor) -> Tensor:
    """The dense tensor; raises FormatError where the parts contradict each other.

    No memory is taken for the shape before the bitmap's own size agrees with it.
    """
    count = prod(facts.shape)
    dtype = DTYPES[facts.dtype]
    if values.dim() != 1 or values.dtype != dtype or values.numel() != facts.nnz:
        raise FormatError(f"tensor {name}: its values are not {facts.nnz} of {facts.dtype}")
    if bitmap.dim() != 1 or bitmap.dtype != torch.uint8 or bitmap.numel() != (count + 7) // 8:
        raise FormatError(f"tensor {name}: its bitmap does not have a bit for each of {count}")
    bits = bitmap.numpy()
    beyond = int(bits[-1]) >> (count % 8 or 8)
    if beyond or int(_COUNTS[bits].sum(dtype=np.int64)) != facts.nnz:
        raise FormatError(f"tensor {name}: its bitmap does not keep {facts.nnz} numbers")
    mask = torch.from_numpy(np.unpackbits(bits, count=count, bitorder="little")).view(torch.bool)
    return values.new_zeros(count).masked_scatter_(mask, values).view(facts.shape)


def take(stored: dict[str, Stored], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The parts of every stored tensor, out of `tensors`."""
    try:
        return {name: (tensors.pop(name + VALUES), tensors.pop(name + BITMAP)) for name in stored}
    except KeyError as error:
        raise FormatError(f"tensor {error} is missing") from None
