"""Cases of the suite `attention`, their inputs, and the check of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """`keys` tokens, all of them queries; or one query, if pages are read or entries were dropped.

    page: keys of a page, where a density of the pages is read. chooser: `quest` or
    `doublesparsity`, whose choice is timed too. kept: the density of keys and values in tiles.
    """

    name: str
    keys: int
    width: int
    dtype: str
    density: float
    heads: int = 2
    kv_heads: int = 2
    causal: bool = False
    backward: bool = False
    page: int = 0
    chooser: str = ""
    kept: float = 0.0


def inputs(case: Case, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (1, case.heads, queries),
        (1, case.kv_heads, case.keys),
        (1, case.kv_heads, case.keys),
    ]
    made = (torch.randn(*shape, case.width, generator=generator) for shape in shapes)
    query, key, value = (part.to(DTYPES[case.dtype]) for part in made)
    return query, key, value


def check(case: Case, name: str, found: Tensor, expected: Tensor) -> None:
    found, expected = found.detach(), expected.detach()
    error = float((found.double() - expected.double()).norm() / expected.norm())
    if not error < (3e-2 if case.dtype == "bfloat16" else 1e-3):
        raise GossamerError(f"{name} is wrong on {case}: relative error {error:.1e}")
