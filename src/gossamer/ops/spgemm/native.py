"""The compiled home of the sparse times sparse product."""

from __future__ import annotations

from typing import Any

import torch

from gossamer.ops._dispatch import kernels
from gossamer.ops.spgemm.reference import Parts

_SMALL = 1 << 12
"""Below so many stored numbers in the left matrix a second thread costs more than it gains."""


def multiply(a: Parts, b: Parts, cols: int, sort: bool) -> Parts:
    """Counts the columns of every row, then fills them."""
    module: Any = kernels()
    assert module is not None
    rows, inner = a[0].numel() - 1, b[0].numel() - 1
    left, right = _parts(a, rows, inner), _parts(b, inner, cols)
    threads = 1 if a[1].numel() < _SMALL else torch.get_num_threads()
    counts = torch.empty(rows, dtype=torch.int64)
    module.spgemm_count(left, right, counts.data_ptr(), threads)
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_ptr[1:])
    columns = torch.empty(int(row_ptr[-1]), dtype=torch.int32)
    values = a[2].new_empty(columns.numel())
    addresses = (columns.data_ptr(), values.data_ptr())
    module.spgemm_fill(left, right, row_ptr.data_ptr(), sort, *addresses, threads)
    return row_ptr, columns, values


def _parts(matrix: Parts, rows: int, cols: int) -> tuple[int | bool, ...]:
    row_ptr, columns, values = matrix
    addresses = (row_ptr.data_ptr(), columns.data_ptr(), values.data_ptr())
    return (*addresses, rows, cols, values.dtype == torch.float64)
