"""What calibration sums: x^T x, with what rounding would lose."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import UsageError
from gossamer.ops import _dispatch
from gossamer.ops.statistics import reference

__all__ = ["add_gram"]

_ROWS = 256
"""Rows of x in one float32 product, whose own rounding nothing repairs.

Each BLAS sums in an order of its own: some narrow products run through one accumulator. The bound
for any order is rows / 2^24, so fewer rows are more exact and slower. Of 4096 x 1024, 1024 rows
take 72 ms, 256 take 80, 64 take 105 (one thread of a Zen 4).
"""
_COLUMNS = 512
"""Columns on a side of a block of x^T x; only blocks on and above the diagonal are computed."""
_SMALL = 1 << 16
"""Below so many numbers a second thread costs more than it gains."""


def add_gram(total: Tensor, rest: Tensor, x: Tensor) -> None:
    """total + rest += x^T x in place, in the blocks on and above the diagonal.

    total, rest: (in, in) float32, contiguous; x: (rows, in) float32. The products are float32 over
    256 rows each, wrong by at most 2^-16 of the sum of their terms' magnitudes in any order of
    summation. Their sums lose nothing that a second float32 can hold ("A Floating-Point Technique
    for Extending the Available Precision", 1971). What lies below the diagonal blocks is undefined:
    the result is symmetric. O(rows * in^2 / 2) multiplications.

    Raises UsageError for other shapes, dtypes or devices.
    """
    n = x.shape[-1]
    parts = (total, rest, x)
    right = x.dim() == 2 and total.shape == rest.shape == (n, n)
    right = right and total.is_contiguous() and rest.is_contiguous()
    if not right or any(part.dtype != torch.float32 or not part.is_cpu for part in parts):
        raise UsageError("a Gram matrix takes float32 (rows, in) and two (in, in) on the CPU")
    for rows in x.split(_ROWS):
        for first in range(0, n, _COLUMNS):
            last = min(n, first + _COLUMNS)
            product = rows[:, first:last].t() @ rows[:, first:]
            _add(total[first:last, first:], rest[first:last, first:], product)


def _add(total: Tensor, rest: Tensor, product: Tensor) -> None:
    module = _dispatch.kernels()
    if module is None or _dispatch.isa_index() < 0:
        reference.compensated_add(total, rest, product)
        return
    module.compensated_add(total, rest, product, _threads(product))


def _threads(numbers: Tensor) -> int:
    return 1 if numbers.numel() < _SMALL else torch.get_num_threads()
