"""SparseGPT against a straightforward float64 implementation of the published algorithm.

The twin removes columns from the inverse Hessian one by one by the rank-one formula, never by a
Cholesky factor, and updates every weight to the right at once, without lazy blocks.
"""

import pytest
import torch

import gossamer as gs
from gossamer.core.select import kept_count
from gossamer.core.stats import LayerStats


def inverses(hessian):
    """diag_j and row_j of the inverse of what is left once columns before j are gone."""
    n = len(hessian)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n).double())
    diagonal, rows = [], []
    for j in range(n):
        diagonal.append(inverse[j, j].item())
        rows.append(inverse[j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.tensor(diagonal, dtype=torch.float64), rows


def keep_best(scores, k):
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


def twin(weight, hessian, pattern, density, width):
    weight = weight.double().clone()
    rows, cols = weight.shape
    diagonal, lines = inverses(hessian)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for j in range(cols):
        if isinstance(pattern, gs.NM):
            if j % pattern.group == 0:
                group = slice(j, j + pattern.group)
                scores = weight[:, group] ** 2 / diagonal[group]
                for row in range(rows):
                    mask[row, group] = keep_best(scores[row], pattern.keep)
        elif j % width == 0 and getattr(pattern, "scope", "") in ("row", "column"):
            end = min(j + width, cols)
            scores = weight[:, j:end] ** 2 / diagonal[j:end]
            if pattern.scope == "row":
                quota = kept_count(end, density) - kept_count(j, density)
                for row in range(rows):
                    mask[row, j:end] = keep_best(scores[row], quota)
            else:
                for column in range(end - j):
                    mask[:, j + column] = keep_best(scores[:, column], kept_count(rows, density))
        elif j % width == 0 and isinstance(pattern, gs.Channel):
            end = min(j + width, cols)
            scores = (weight[:, j:end] ** 2 / diagonal[j:end]).sum(0)
            mask[:, j:end] = keep_best(scores, kept_count(end, density) - kept_count(j, density))
        elif j % width == 0:
            end = min(j + width, cols)
            scores = weight[:, j:end] ** 2 / diagonal[j:end]
            tall, wide = (pattern.rows, pattern.cols) if isinstance(pattern, gs.Block) else (1, 1)
            tiles = scores.reshape(rows // tall, tall, (end - j) // wide, wide).sum(dim=(1, 3))
            per_column = rows // tall
            quota = kept_count(per_column * end // wide, density)
            quota -= kept_count(per_column * j // wide, density)
            chosen = keep_best(tiles, quota)
            mask[:, j:end] = chosen.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        error = torch.where(mask[:, j], 0.0, weight[:, j]) / diagonal[j]
        weight[:, j:] -= torch.outer(error, lines[j][j:])
    return weight * mask, mask


PATTERNS = [
    gs.Unstructured(),
    gs.NM(2, 4),
    gs.NM(1, 4),
    gs.NM(3, 8),
    gs.Block(4, 1),
    gs.Block(2, 4),
    gs.Unstructured("row"),
    gs.Unstructured("column"),
    gs.Channel(1),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=gs.format_pattern)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("width", [16, 64])
def test_weights_equal_the_straightforward_twin(pattern, seed, width):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator, dtype=torch.float64)
    mix = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(300, 64, generator=generator, dtype=torch.float64) @ mix
    hessian = 2 / len(x) * x.t() @ x
    density = pattern.density if isinstance(pattern, gs.NM) else 0.5
    expected, mask = twin(weight, hessian, pattern, density, width)
    stats = LayerStats("layer", len(x), hessian=hessian)
    got, support = gs.weights.SparseGPT(block=width).solve(weight, stats, pattern, density)
    assert torch.equal(support.mask, mask)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    single, _ = gs.weights.SparseGPT(block=width).solve(weight.float(), stats, pattern, density)
    assert ((single.double() - expected).norm() / expected.norm()).item() < 1e-3


def test_a_density_that_contradicts_the_pattern_is_refused():
    stats = LayerStats("layer", 9, hessian=torch.eye(8))
    with pytest.raises(gs.PatternError, match="contradicts"):
        gs.weights.SparseGPT().solve(torch.randn(4, 8), stats, gs.NM(2, 4), 0.9)


def test_dead_inputs_are_zeroed():
    x = torch.randn(200, 16, dtype=torch.float64)
    x[:, 5] = 0
    stats = LayerStats("layer", 200, hessian=x.t() @ x)
    weight, _ = gs.weights.SparseGPT().solve(torch.randn(8, 16), stats, gs.Unstructured(), 0.9)
    assert not weight[:, 5].any() and torch.isfinite(weight).all()


def test_fewer_rows_than_inputs_still_solves():
    x = torch.randn(4, 32, dtype=torch.float64)
    stats = LayerStats("layer", 4, hessian=x.t() @ x)
    weight, support = gs.weights.SparseGPT().solve(torch.randn(8, 32), stats, gs.NM(2, 4), 0.5)
    assert torch.isfinite(weight).all() and support.density == 0.5
