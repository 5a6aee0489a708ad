"""Edges of a mesh and what augments them: hops, random edges, dilated windows, global nodes.

Edges are int64 (2, n): the node that attends and the node that it attends. Every function returns
them sorted by the first, none twice, and without edges from a node to itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.methods.attention.tiles import check_count
from gossamer.ops.attention import Layout


def from_cells(cells: Tensor) -> Tensor:
    """The sides of polygons, both ways; cells int64 (n, corners), corners in their order around."""
    if cells.dtype != torch.int64 or cells.dim() != 2 or cells.shape[1] < 2:
        raise UsageError(f"cells are int64 (n, corners), not {cells.dtype} {tuple(cells.shape)}")
    return both_ways(torch.stack([cells.flatten(), cells.roll(-1, 1).flatten()]))


def both_ways(edges: Tensor) -> Tensor:
    """With the reverse of each edge."""
    return tidy(torch.cat([edges, edges.flip(0)], dim=1))


def tidy(edges: Tensor) -> Tensor:
    """Sorted, none twice, without edges from a node to itself."""
    return edges[:, edges[0] != edges[1]].unique(dim=1)


def layout_of(edges: Tensor, nodes: int) -> Layout:
    """The executor's layout: each node attends along its edges. Edges as `tidy` gives them."""
    _check(edges, nodes)
    counts = torch.bincount(edges[0], minlength=nodes)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Layout.from_csr(offsets, edges[1], nodes)


def hops(edges: Tensor, nodes: int, count: int) -> Tensor:
    """All pairs that at most `count` edges join: the pattern of A + A^2 + ..."""
    check_count("hops", "count", count)
    _check(edges, nodes)
    edges = tidy(edges)
    degree = torch.bincount(edges[0], minlength=nodes)
    first = degree.cumsum(0) - degree
    found = last = edges
    for _ in range(count - 1):
        repeats = degree[last[1]]
        ends = repeats.cumsum(0) - repeats
        inside = torch.arange(int(repeats.sum()), device=edges.device)
        inside = inside - ends.repeat_interleave(repeats)
        places = first[last[1]].repeat_interleave(repeats) + inside
        last = tidy(torch.stack([last[0].repeat_interleave(repeats), edges[1][places]]))
        found = tidy(torch.cat([found, last], dim=1))
    return found


def with_random(edges: Tensor, nodes: int, share: float, generator: torch.Generator) -> Tensor:
    """With random undirected edges, as many as `share` of those there are, fewer where they meet."""
    _check(edges, nodes)
    if not 0 <= share < float("inf"):
        raise UsageError(f"share is a number from 0, not {share!r}")
    count = round(share * edges.shape[1] / 2)
    added = torch.randint(0, max(1, nodes), (2, count), generator=generator).to(edges.device)
    return tidy(torch.cat([edges, added, added.flip(0)], dim=1))


def dilated(edges: Tensor, nodes: int, window: int = 1, levels: int = 3) -> Tensor:
    """With windows of growing steps along the reverse Cuthill-McKee order.

    The node at place i and those at i +- r 2^m are joined, for r from 1 to `window` and m from 0 to
    `levels` - 1.
    """
    check_count("dilated", "window", window)
    check_count("dilated", "levels", levels)
    order, added = banded_order(edges, nodes), [edges]
    for step in sorted({r << m for r in range(1, window + 1) for m in range(levels)}):
        added += [torch.stack([order[:-step], order[step:]])] if step < nodes else []
    return both_ways(torch.cat(added, dim=1))


def with_global(edges: Tensor, nodes: int, count: int) -> Tensor:
    """With `count` nodes, evenly spread over the same order, joined to all others both ways."""
    check_count("with_global", "count", count)
    order = banded_order(edges, nodes)
    places = torch.linspace(0, nodes - 1, min(count, nodes) + 2, device=edges.device)[1:-1]
    chosen = order[places.round().long().clamp(max=max(0, nodes - 1))].unique()
    every = torch.arange(nodes, device=edges.device)
    added = torch.stack([chosen.repeat_interleave(nodes), every.repeat(len(chosen))])
    return both_ways(torch.cat([edges, added], dim=1))


def banded_order(edges: Tensor, nodes: int) -> Tensor:
    """int64 (nodes,): the nodes in reverse Cuthill-McKee order, which keeps neighbours near.

    Raises MissingExtra where scipy is not installed.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee
    except ImportError:
        raise MissingExtra("scipy", "graphs") from None
    _check(edges, nodes)
    rows, columns = both_ways(edges).cpu().numpy()
    values = torch.ones(len(rows), dtype=torch.int8).numpy()
    matrix = csr_array((values, (rows, columns)), shape=(nodes, nodes))
    order = reverse_cuthill_mckee(matrix, symmetric_mode=True)
    return torch.from_numpy(order.astype("int64")).to(edges.device)


def _check(edges: Tensor, nodes: int) -> None:
    if edges.dtype != torch.int64 or edges.dim() != 2 or edges.shape[0] != 2:
        raise UsageError(f"edges are int64 (2, n), not {edges.dtype} {tuple(edges.shape)}")
    if edges.numel() and not (int(edges.min()) >= 0 and int(edges.max()) < nodes):
        raise UsageError(
            f"edges join nodes 0 to {nodes - 1}; found {int(edges.min())} to {int(edges.max())}"
        )
