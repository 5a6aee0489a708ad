"""What a product with a layer costs on one machine: a small model fitted to measured times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gossamer.core.errors import FormatError

VERSION = 2


@dataclass(frozen=True)
class ProductShape:
    """A matrix (out, inputs) of which `density` is kept; `high` rows, on average, share a column.

    Of a convolution, inputs are the channels times the places of its kernel.
    """

    out: int
    inputs: int
    density: float = 1.0
    high: float = 1

    def terms(self) -> tuple[float, float, float, float, float]:
        """What time grows with: a call, the vectors, all positions, kept ones, loads of inputs."""
        positions = float(self.out * self.inputs)
        kept = self.density * positions
        return 1.0, float(self.out + self.inputs), positions, kept, kept / self.high


class Predictor(Protocol):
    """What tells the seconds of a product: latencies that were measured, or something that measures."""

    @property
    def word(self) -> str:
        """How it knows, such as `predicted`."""
        ...

    @property
    def note(self) -> str:
        """What is to be added to what it says, if anything."""
        ...

    def seconds(
        self, kernel: str, dtype: str, rows: int, shape: ProductShape, calls: bool = True
    ) -> float | None:
        """Of one product, None where it is not known."""
        ...

    def unpack_from(self, dtype: str, shape: ProductShape) -> int | None:
        """From how many rows on unpacking pays."""
        ...


@dataclass(frozen=True)
class LatencyModel:
    """Seconds by kernel, dtype, shape, density and batch size, for one machine.

    Between measured batch sizes the model is linear. Beyond them it goes on as it ended. No term is
    negative, so more kept weights never get cheaper.

    Attributes
    ----------
    machine : mapping
        What the times hold for.
    terms : mapping
        By "kernel dtype", such as "sell-spmm bfloat16" or "dense float32", then by the batch sizes
        that were measured: the seconds of each of `ProductShape.terms`.
    """

    machine: Mapping[str, str | int]
    terms: Mapping[str, Mapping[int, tuple[float, ...]]]

    @property
    def word(self) -> str:
        """How the seconds are known."""
        return "predicted"

    @property
    def note(self) -> str:
        """Nothing."""
        return ""

    def seconds(
        self, kernel: str, dtype: str, rows: int, shape: ProductShape, calls: bool = True
    ) -> float | None:
        """Predicted time of one product, None for a kernel that was not measured.

        rows: the batch size, pixels for convolutions. calls: count what a call costs in itself.
        """
        measured = self.terms.get(f"{kernel} {dtype}")
        if not measured:
            return None
        amounts = shape.terms() if calls else (0.0, *shape.terms()[1:])
        points = [
            (at, math.fsum(a * b for a, b in zip(measured[at], amounts, strict=True)))
            for at in sorted(measured)
        ]
        if len(points) == 1 or rows <= points[0][0]:
            return points[0][1]
        pairs = list(itertools.pairwise(points))
        (low, before), (high, after) = next((p for p in pairs if rows <= p[1][0]), pairs[-1])
        slope = max(0.0, (after - before) / (high - low))
        return before + slope * (rows - low) if rows <= high else after + slope * (rows - high)

    def unpack_from(self, dtype: str, shape: ProductShape) -> int | None:
        """From how many rows on unpacking for a dense product beats the row-wise kernel.

        A very large number where it never does; None where one of them was not measured.
        """
        found = 1 << 62
        for rows in (1024, 512, 256, 128, 64, 32, 16, 9):
            unpacked = self.seconds("bitmap-unpack", dtype, rows, shape)
            straight = self.seconds("bitmap-spmm", dtype, rows, shape)
            if unpacked is None or straight is None:
                return None
            if unpacked > straight:
                break
            found = rows
        return found

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        terms = {
            name: {str(rows): list(latency) for rows, latency in by_rows.items()}
            for name, by_rows in self.terms.items()
        }
        return {"version": VERSION, "machine": dict(self.machine), "terms": terms}

    @classmethod
    def from_json(cls, data: Any) -> LatencyModel:
        """Back from `to_json`; raises FormatError for anything that it would not have written."""
        try:
            if set(data) != {"version", "machine", "terms"} or data["version"] != VERSION:
                raise FormatError(f"latencies are not of version {VERSION}")
            terms = {
                str(name): {int(rows): _terms(latency) for rows, latency in by_rows.items()}
                for name, by_rows in data["terms"].items()
            }
            machine = {str(k): v for k, v in data["machine"].items() if isinstance(v, str | int)}
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"latencies are damaged: {type(error).__name__}") from None
        if not terms or not all(terms.values()) or min(min(r) for r in terms.values()) < 1:
            raise FormatError("latencies name no kernel, or no batch size for one")
        return cls(machine, terms)


def _terms(numbers: Any) -> tuple[float, ...]:
    found = tuple(float(number) for number in numbers)
    count = len(ProductShape(1, 1).terms())
    if len(found) != count or not all(math.isfinite(x) and x >= 0 for x in found):
        raise FormatError(f"a kernel's terms are not {count} numbers from 0 on")
    return found


def fit(points: Sequence[tuple[ProductShape, float]]) -> tuple[float, ...]:
    """The terms, none negative, whose predictions have the least squared relative error.

    points: work and its measured seconds. The five terms have 31 subsets, so the non-negative
    least squares problem is solved by trying all: its solution is an ordinary one on its support.
    """
    seconds = torch.tensor([taken for _, taken in points], dtype=torch.float64)
    rows = torch.tensor([shape.terms() for shape, _ in points], dtype=torch.float64)
    rows = rows / seconds.unsqueeze(1)
    scale = rows.amax(dim=0)  # comparable columns, so that the least squares are well posed
    rows, ones = rows / scale, torch.ones(len(points), dtype=torch.float64)
    best, least = torch.zeros(rows.shape[1], dtype=torch.float64), math.inf
    for count in range(1, rows.shape[1] + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), count):
            part = rows[:, list(chosen)]
            solution = torch.linalg.lstsq(part, ones, driver="gelsd").solution
            error = float((part @ solution - ones).square().sum())
            if bool((solution >= 0).all()) and error < least - 1e-12:
                least, best = error, torch.zeros_like(best)
                best[list(chosen)] = solution
    return tuple((best / scale).tolist())
