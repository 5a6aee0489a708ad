"""The plain reference of the SELL operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.ops.bitmap.reference import unpack

COLUMNS, FOUR, SHARED, BATCH = 112, 4, 4, 64
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def chunk_rows(rows: int) -> int:
    """Rows that are sorted together: few enough for 8 chunks, from 64 up to 512.

    More rows sort better, fewer keep their sums in the second-level cache and more threads busy.
    """
    return max(64, min(512, -(-rows // 8)))


def build(values: Tensor, bitmap: Tensor, row_ptr: Tensor, in_features: int) -> Parts:
    """values, columns, rows, groups, offsets: see `Sell`."""
    mask = unpack(torch.ones_like(values), bitmap, in_features) != 0
    matrix = unpack(values, bitmap, in_features)
    chunk = chunk_rows(len(mask))
    groups, rows, columns, offsets = [], [], [], [[0, 0, 0, 0]]
    kept = [values.new_zeros(1)]
    for top in range(0, len(mask), chunk):
        for first in range(0, in_features, COLUMNS):
            keeps = mask[top : top + chunk, first : first + COLUMNS]
            tile = matrix[top : top + chunk, first : first + COLUMNS]
            tile = torch.nn.functional.pad(tile, (0, 1, 0, 1))
            sizes = []
            for shared, length, four in _fours(keeps, chunk):
                order = _order(keeps, shared, length, four)
                columns += [c for one, _ in order for c in one]
                kept += [tile[min(r, len(keeps)), min(c, tile.shape[1] - 1)] for _, pairs in order
                         for r, c in pairs]  # fmt: skip
                rows += four
                sizes.append((shared, length - shared))
            found = sorted(set(sizes), key=sizes.index)
            groups += [[*size, sizes.count(size)] for size in found]
            total = sum(part.numel() for part in kept) - 1
            offsets.append([len(groups), len(rows), len(columns), total])
    return (
        torch.cat([part.reshape(-1) for part in kept]),
        torch.tensor(columns, dtype=torch.uint8),
        torch.tensor(rows, dtype=torch.uint16),
        torch.tensor(groups, dtype=torch.uint16).reshape(-1, 3),
        torch.tensor(offsets),
    )


def _fours(keeps: Tensor, none: int) -> list[tuple[int, int, list[int]]]:
    """Shared columns, columns of the longest row, and the rows; in the order of storage."""
    counts = keeps.sum(1).tolist()
    order = sorted((r for r in range(len(keeps)) if counts[r]), key=lambda r: int(counts[r]))
    order += [none] * (-len(order) % FOUR)
    empty = torch.zeros(1, keeps.shape[1], dtype=torch.bool)
    keeps = torch.cat([keeps, empty])
    fours = []
    for at in range(0, len(order), FOUR):
        a, b, c, d = (min(r, len(keeps) - 1) for r in order[at : at + FOUR])
        both = min(int((keeps[a] & keeps[b]).sum()), int((keeps[c] & keeps[d]).sum()))
        longest = max(int(keeps[r].sum()) for r in (a, b, c, d))
        fours.append((both // SHARED * SHARED, longest, order[at : at + FOUR]))
    return sorted(fours, key=lambda four: (four[1], four[0]))


def _order(
    keeps: Tensor, shared: int, length: int, four: list[int]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The stored columns, each with the (row, column) of the values that follow it."""
    none = [COLUMNS]
    sets = [set(keeps[r].nonzero().flatten().tolist()) if r < len(keeps) else set() for r in four]
    common = [sorted(sets[p] & sets[p + 1])[:shared] for p in (0, 2)]
    steps = []
    for s in range(shared):
        for pair in (0, 1):
            c = common[pair][s]
            steps.append(([c], [(four[2 * pair], c), (four[2 * pair + 1], c)]))
    left = [sorted(kept - set(common[r // 2])) for r, kept in enumerate(sets)]
    for s in range(length - shared):
        for r in range(FOUR):
            c = (left[r][s : s + 1] or none)[0]
            steps.append(([c], [(four[r], c)]))
    return steps


def to_matrix(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """The dense matrix (out, in), by following the form's own definition."""
    values, columns, rows, groups, offsets = parts
    chunk, blocks = chunk_rows(shape[0]), -(-shape[1] // COLUMNS)
    matrix = values.new_zeros(shape[0] + chunk, blocks * COLUMNS + COLUMNS + 1)
    edges, places, stored = offsets.tolist(), rows.tolist(), columns.tolist()
    for at, (begin, row, column, value) in enumerate(edges[:-1]):
        top, first = at // blocks * chunk, at % blocks * COLUMNS
        for shared, single, count in groups.tolist()[begin : edges[at + 1][0]]:
            for _ in range(count):
                four = [top + r if r < chunk else -1 for r in places[row : row + FOUR]]
                row += FOUR
                pattern = [(2 * p, 2 * p + 1) for _ in range(shared) for p in (0, 1)]
                pattern += [(r,) for _ in range(single) for r in range(FOUR)]  # type: ignore[misc]
                for served in pattern:
                    c = stored[column]
                    for r in served:
                        if c < COLUMNS and four[r] >= 0:
                            matrix[four[r], first + c] = values[value + 1]
                        value += 1
                    column += 1
    return matrix[: shape[0], : shape[1]]


def linear(
    x: Tensor, parts: Parts, shape: tuple[int, int], bias: Tensor | None, relu: bool
) -> Tensor:
    """x W^T + bias through the dense matrix; columns that a row does not keep count as zero."""
    matrix = to_matrix(parts, shape).float()
    rows = x.reshape(math.prod(x.shape[:-1]), shape[1]).float()
    finite = torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
    result = finite @ matrix.t()
    if (odd := ~torch.isfinite(rows)).any():
        for row, column in odd.nonzero().tolist():
            keeps = matrix[:, column] != 0
            result[row, keeps] += rows[row, column] * matrix[keeps, column]
    if bias is not None:
        result = result + bias.float()
    result = torch.relu(result) if relu else result
    return result.to(x.dtype).reshape(*x.shape[:-1], shape[0])
