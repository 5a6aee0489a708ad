"""Suite `spgemm`: the square of a sparse matrix, against scipy and torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.core.errors import GossamerError, MissingExtra
from gossamer.ops import spgemm


@dataclass(frozen=True)
class Case:
    """A graph of `nodes` nodes with `degree` edges each on average, columns sorted or not."""

    name: str
    nodes: int
    degree: int
    power_law: bool
    sort: bool


def cases() -> list[Case]:
    """Random and power-law graphs of two sizes, columns in any order and sorted."""
    return [
        Case(f"{kind} {nodes} nodes degree {degree} {order}", nodes, degree, power_law, sort)
        for kind, power_law in (("random", False), ("power law", True))
        for nodes, degree in ((20_000, 16), (200_000, 8))
        for order, sort in (("any order", False), ("sorted", True))
    ]


def measure(case: Case, limits: Limits, rounds: Repeats | int = 7) -> dict[str, Any]:
    """Times of ours and the baselines; raises GossamerError where a result is wrong.

    The limit counts the bytes of both factors and the result once each: a bound that no row-wise
    product reaches, since it reads rows of the right matrix as often as the left one names them.
    """
    try:
        from scipy import sparse
    except ImportError:
        raise MissingExtra("scipy", "test") from None
    row_ptr, columns, values = edges(case)
    shape = (case.nodes, case.nodes)
    theirs = sparse.csr_matrix((values.numpy(), columns.numpy(), row_ptr.numpy()), shape)
    parts = (row_ptr, columns, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its CSR is in beta
        matrix = torch.sparse_csr_tensor(*parts, shape, check_invariants=False)

    def scipy_product() -> object:
        product = theirs @ theirs
        if case.sort:
            product.sort_indices()
        return product

    calls: dict[str, Callable[[], object]] = {
        "gossamer": lambda: spgemm.multiply(*parts, *parts, case.nodes, case.sort),
        "scipy csr": scipy_product,
        "torch csr": lambda: torch.mm(matrix, matrix),
    }
    result = spgemm.multiply(*parts, *parts, case.nodes, case.sort)
    _check(case, result, theirs)
    turns = interleaved(calls, rounds)
    nbytes = sum(part.nbytes for part in (*parts, *parts, *result))
    found = turns.record(case, limits.seconds(nbytes, 0), rivals="csr")
    facts = {**found["case"], "edges": columns.numel(), "result": result[1].numel()}
    return {**found, "case": facts}


def edges(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """int32 offsets and columns, float32 values; seed 0.

    Random: targets uniform. Power law: out-degrees Pareto with exponent 2.2, targets drawn by a
    power of a uniform number, so that some nodes are named often; duplicates are merged.
    """
    generator = torch.Generator().manual_seed(0)
    n, degree = case.nodes, case.degree
    degrees = torch.full((n,), degree)
    if case.power_law:
        share = torch.rand(n, generator=generator).pow(-1 / 1.2)
        degrees = (share * degree / share.mean()).long().clamp(1, n // 20)
    rows = torch.arange(n).repeat_interleave(degrees)
    spread = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    columns = (spread.pow(2.5 if case.power_law else 1.0) * n).long().clamp_max(n - 1)
    if case.power_law:  # popular targets anywhere, not all at the beginning
        columns = torch.randperm(n, generator=generator)[columns]
    unique = torch.unique(rows * n + columns)
    row_ptr = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(unique // n, minlength=n), 0, out=row_ptr[1:])
    values = torch.randn(len(unique), generator=generator)
    return row_ptr.to(torch.int32), (unique % n).to(torch.int32), values


def _check(case: Case, result: tuple[Tensor, Tensor, Tensor], theirs: Any) -> None:
    """Same pattern as scipy's, values within float32 rounding."""
    from scipy import sparse

    row_ptr, columns, values = (part.numpy() for part in result)
    ours = sparse.csr_matrix((values, columns, row_ptr), theirs.shape)
    if case.sort and not ours.has_sorted_indices:
        raise GossamerError(f"columns are not sorted on {case}")
    expected = theirs.astype("float64") @ theirs.astype("float64")
    off = (ours - expected).tocoo()
    error = (off.data**2).sum() ** 0.5 / (expected.data**2).sum() ** 0.5
    if ours.nnz != expected.nnz or not error < 1e-4:
        raise GossamerError(f"gossamer is wrong on {case}: relative error {error:.1e}")
