"""The plain reference of the sparse times sparse product."""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]


def multiply(a: Parts, b: Parts, cols: int, sort: bool) -> Parts:
    """Row by row, an ordered dictionary as accumulator."""
    row_ptr, columns, values = [0], [], []
    a_ptr, b_ptr = a[0].tolist(), b[0].tolist()
    a_columns, a_values = a[1].tolist(), a[2].double().tolist()
    b_columns, b_values = b[1].tolist(), b[2].double().tolist()
    for i in range(len(a_ptr) - 1):
        sums: dict[int, float] = {}
        for p in range(a_ptr[i], a_ptr[i + 1]):
            k = a_columns[p]
            for q in range(b_ptr[k], b_ptr[k + 1]):
                column, product = b_columns[q], a_values[p] * b_values[q]
                sums[column] = sums[column] + product if column in sums else product
        order = sorted(sums) if sort else list(sums)
        columns += order
        values += [sums[column] for column in order]
        row_ptr.append(len(columns))
    return (
        torch.tensor(row_ptr, dtype=torch.int64),
        torch.tensor(columns, dtype=torch.int32),
        torch.tensor(values, dtype=a[2].dtype),
    )
