"""To and from PyTorch's 2:4 tensors for CUDA (torch.sparse.SparseSemiStructuredTensor).

CUTLASS's layout holds the two kept values of every 4 columns side by side, and 4 bits per group,
the place of the first and of the second, four groups in an int16. Those are stored in the order in
which tensor cores load them: rows interleaved within 32, 2 x 2 blocks turned, columns in pairs.
Layout after CUTLASS's reorder_meta; the pattern after "Accelerating Sparse Deep Neural Networks"
(2021). cuSPARSELt's layout is private to that library and can only be made by it, on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.nn.packed.bitmap import BitmapLinear
from gossamer.nn.packed.nm import NMLinear
from gossamer.ops import nm as ops

_DTYPES = (torch.float16, torch.bfloat16)


def to_semi_structured(
    weight: NMLinear | BitmapLinear | Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Give a 2:4 weight as torch's `SparseSemiStructuredTensorCUTLASS`, on the device where it is.

    On a CUDA device `functional.linear(x, it)` then multiplies with sparse tensor cores. The tensor
    can be made on any device. O(out * in).

    Parameters
    ----------
    weight : NMLinear, BitmapLinear or Tensor
        (out, in), with at most 2 non-zeros in each group of 4 columns.
    dtype : torch.dtype, optional
        float16 or bfloat16. By default the weight's own.

    Returns
    -------
    Tensor
        torch's sparse tensor.

    Raises
    ------
    UsageError
        Where a group has more than 2 non-zeros, out is no multiple of 32, in none of 64, or the
        dtype is another.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> weight = torch.tensor([1.0, 0.0, 2.0, 0.0]).repeat(64, 32).to(torch.bfloat16)
    >>> gs.to_semi_structured(weight).shape
    torch.Size([64, 128])
    """
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    matrix = weight if isinstance(weight, Tensor) else weight.to_matrix()
    matrix = matrix.detach().to(dtype or matrix.dtype)
    packed, meta = to_cutlass(matrix)
    made: Tensor = SparseSemiStructuredTensorCUTLASS(matrix.shape, packed, meta, None, None, None)
    return made


def from_semi_structured(
    weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> NMLinear:
    """Make a CPU layer of a 2:4 tensor of either of torch's backends. O(out * in).

    Parameters
    ----------
    weight : Tensor
        A `SparseSemiStructuredTensor`.
    bias : Tensor, optional
        (out,).
    dtype : torch.dtype
        Of the layer's values.

    Raises
    ------
    UsageError
        For any other tensor.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> weight = torch.tensor([1.0, 0.0, 2.0, 0.0]).repeat(64, 32).to(torch.bfloat16)
    >>> type(gs.from_semi_structured(gs.to_semi_structured(weight))).__name__
    'NMLinear'
    """
    from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

    found: object = weight
    if isinstance(found, SparseSemiStructuredTensorCUTLASS) and found.packed is not None:
        assert found.meta is not None
        matrix = from_cutlass(found.packed, found.meta)
    elif isinstance(found, SparseSemiStructuredTensor):
        matrix = found.to_dense()  # cuSPARSELt's: by a product, on the GPU
    else:
        raise UsageError(f"expected torch's semi-structured tensor, not {type(weight).__name__}")
    bias = None if bias is None else bias.detach().cpu()
    return NMLinear.from_matrix(matrix.detach().cpu().to(dtype), bias, "2:4")


def to_cutlass(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(values (out, in / 2), meta int16 (out, in / 16)) of a 2:4 matrix in float16 or bfloat16."""
    rows, cols = _check(matrix)
    groups = matrix.reshape(rows, cols // 4, 4)
    a, b, _, d = (groups != 0).unbind(-1)
    # A group with fewer than two non-zeros stores zeros at the places that torch takes.
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = torch.where(a & b, 1, torch.where((a | b) & ~d, 2, 3))
    places = torch.stack((first, second), -1)
    values = groups.gather(-1, places).reshape(rows, cols // 2)
    nibbles = (first | second << 2).reshape(rows, cols // 16, 4)
    words = (nibbles << 4 * torch.arange(4, device=matrix.device)).sum(-1).to(torch.int16)
    meta = torch.empty_like(words).reshape(-1)
    meta[_order(rows, cols // 16, matrix.device).reshape(-1)] = words.reshape(-1)
    return values, meta.reshape(rows, cols // 16)


def from_cutlass(values: Tensor, meta: Tensor) -> Tensor:
    """The dense matrix (out, in) in the dtype of `values`; raises UsageError for odd parts."""
    rows, cols = values.shape[0], 2 * values.shape[-1]
    if values.dtype not in _DTYPES or meta.dtype != torch.int16 or meta.shape != (rows, cols // 16):
        raise UsageError("expected float16 or bfloat16 values (out, in / 2) and int16 meta")
    order = _order(rows, cols // 16, values.device).reshape(-1)
    words = meta.reshape(-1)[order].reshape(rows, cols // 16, 1).int()
    places = words >> 2 * torch.arange(8, device=values.device) & 3
    matrix = torch.zeros(rows, cols // 4, 4, dtype=values.dtype, device=values.device)
    matrix.scatter_(
        -1, places.reshape(rows, cols // 4, 2).long(), values.reshape(rows, cols // 4, 2)
    )
    return matrix.reshape(rows, cols)


def _order(rows: int, words: int, device: torch.device) -> Tensor:
    """int64 (rows, words): where in memory each word of meta lies."""
    row = torch.arange(rows, device=device).unsqueeze(1)
    column = torch.arange(words, device=device).unsqueeze(0)
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    turn = (
        (row + column) % 2 * torch.where(row % 2 == 0, 1, -1)
    )  # off the diagonal of a 2 x 2 block
    row, column = row + turn, column - turn
    return column // 2 * 2 * rows + row * 2 + column % 2


def _check(matrix: Tensor) -> tuple[int, int]:
    if matrix.dim() != 2 or matrix.dtype not in _DTYPES:
        raise UsageError(
            f"2:4 tensors for CUDA are float16 or bfloat16 matrices, not {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}; give dtype="
        )
    rows, cols = matrix.shape
    if rows % 32 or cols % 64 or not matrix.numel():
        raise UsageError(f"CUTLASS needs rows in 32s and columns in 64s, not {rows}x{cols}")
    if not ops.fits(matrix, 2, 4):
        raise UsageError("a group of 4 columns holds more than 2 non-zeros: the weight is not 2:4")
    return rows, cols
