"""Sparse times sparse, row by row with a hash table as accumulator: see csrc/spgemm/spgemm.hpp.

A first pass counts the columns of every row, a second fills them. A row's accumulator is a hash
table of four slots per column of the row, or one slot per column of the right matrix where these
fit the second-level cache. Memory is that of the result (row-wise SpGEMM after Gustavson, "Two fast
algorithms for sparse matrices", 1978; the hash accumulator as in SMASH's software form, 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.spgemm import native, reference

__all__ = ["matmul", "multiply"]

_INT32 = (1 << 31) - 1


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n), both torch CSR of the same dtype, float32 or float64; CSR (m, n).

    Columns ascending, indices int32 (int64 from 2^31 entries on). Entries that cancel to zero stay
    stored, as in scipy. O(multiplications). Not differentiable. Raises UsageError for other layouts
    or dtypes.
    """
    for matrix in (a, b):
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise UsageError(f"expected torch CSR matrices, not {matrix.layout}")
    if a.shape[1] != b.shape[0]:
        raise UsageError(f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    left, right = (
        (matrix.crow_indices(), matrix.col_indices(), matrix.values()) for matrix in (a, b)
    )
    row_ptr, columns, values = multiply(*left, *right, b.shape[1])
    shape = (a.shape[0], b.shape[1])
    if columns.numel() <= _INT32:
        return torch.sparse_csr_tensor(
            row_ptr.to(torch.int32), columns, values, shape, check_invariants=False
        )
    return torch.sparse_csr_tensor(row_ptr, columns.long(), values, shape, check_invariants=False)


def multiply(
    a_ptr: Tensor,
    a_columns: Tensor,
    a_values: Tensor,
    b_ptr: Tensor,
    b_columns: Tensor,
    b_values: Tensor,
    cols: int,
    sort: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_ptr int64, columns int32, values) of a (m, k) times b (k, cols).

    Offsets and columns int32 or int64; columns distinct within a row, in any order; values float32
    or float64, both alike. sort=False leaves each row's columns in the order in which they turn up,
    which saves the sorting. Raises UsageError where the parts contradict each other.
    """
    if a_values.dtype != b_values.dtype or a_values.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"values are both float32 or both float64, not {a_values.dtype} and {b_values.dtype}"
        )
    if not 0 <= cols <= _INT32:
        raise UsageError(f"columns are counted in 31 bits, not {cols}")
    left = _checked(a_ptr, a_columns, a_values, b_ptr.numel() - 1)
    right = _checked(b_ptr, b_columns, b_values, cols)
    if _dispatch.direct(a_values, b_values):
        return _dispatch.backend(reference, native).multiply(left, right, cols, sort)
    return _spgemm(*left, *right, cols, sort)


def _checked(
    row_ptr: Tensor, columns: Tensor, values: Tensor, cols: int
) -> tuple[Tensor, Tensor, Tensor]:
    whole = (torch.int32, torch.int64)
    if row_ptr.dtype not in whole or columns.dtype not in whole:
        raise UsageError("row offsets and columns are int32 or int64")
    if any(part.dim() != 1 or not part.is_cpu for part in (row_ptr, columns, values)):
        raise UsageError("row offsets, columns and values are vectors on the CPU")
    if columns.numel() != values.numel() or row_ptr.numel() < 1:
        raise UsageError(f"{columns.numel()} columns for {values.numel()} values")
    if not torch.compiler.is_compiling():
        ends = int(row_ptr[0]) == 0 and int(row_ptr[-1]) == columns.numel()
        if not ends or bool((row_ptr[1:] < row_ptr[:-1]).any()):
            raise UsageError("row offsets do not rise from 0 to the number of values")
        if columns.numel() and not (int(columns.min()) >= 0 and int(columns.max()) < cols):
            raise UsageError(f"a column is outside 0 to {cols - 1}")
    return (
        row_ptr.to(torch.int64).contiguous(),
        columns.to(torch.int32).contiguous(),
        values.contiguous(),
    )


@torch.library.custom_op("gossamer::spgemm", mutates_args=())
def _spgemm(
    a_ptr: Tensor,
    a_columns: Tensor,
    a_values: Tensor,
    b_ptr: Tensor,
    b_columns: Tensor,
    b_values: Tensor,
    cols: int,
    sort: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = (a_ptr, a_columns, a_values), (b_ptr, b_columns, b_values)
    return _dispatch.backend(reference, native).multiply(left, right, cols, sort)


@_spgemm.register_fake
def _(
    a_ptr: Tensor,
    a_columns: Tensor,
    a_values: Tensor,
    b_ptr: Tensor,
    b_columns: Tensor,
    b_values: Tensor,
    cols: int,
    sort: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    columns = a_columns.new_empty(count, dtype=torch.int32)
    return torch.empty_like(a_ptr), columns, a_values.new_empty(count)
