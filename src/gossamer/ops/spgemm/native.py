"""The compiled backend of the sparse times sparse product."""

from __future__ import annotations

import torch

from gossamer.ops._dispatch import compiled
from gossamer.ops.spgemm.reference import Parts

_SMALL = 1 << 12
"""Below so many stored numbers in the left matrix a second thread costs more than it gains."""


def multiply(a: Parts, b: Parts, cols: int, sort: bool) -> Parts:
    """Counts the columns of every row, then fills them."""
    module = compiled()
    left, right = module.SparseRows(*a, b[0].numel() - 1), module.SparseRows(*b, cols)
    threads = 1 if a[1].numel() < _SMALL else torch.get_num_threads()
    counts = torch.empty(a[0].numel() - 1, dtype=torch.int64)
    module.spgemm_count(left, right, counts, threads)
    row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_ptr[1:])
    columns = torch.empty(int(row_ptr[-1]), dtype=torch.int32)
    values = a[2].new_empty(columns.numel())
    module.spgemm_multiply(left, right, row_ptr, sort, columns, values, threads)
    return row_ptr, columns, values
