"""Choices per input are those of published code, on inputs made from the seeds it was run with."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

import gossamer as gs
from gossamer.ops import active

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["expected"]


def normal(seed, *shape):
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32))


def same(mask, expected):
    packed = np.packbits(mask.numpy().ravel()).tobytes()
    assert int(mask.sum()) == expected["count_true"]
    assert hashlib.sha256(packed).hexdigest() == expected["sha256_packbits"]


def test_batch_top_k_of_saelens():
    expected = golden("saelens_batchtopk")
    scores = torch.relu(normal(1510, 16, 30))
    for k in (3.0, 2.5):
        mask = gs.keep(scores, gs.BatchTopK(k))
        same(mask, expected[f"batchtopk_k{k}_mask"])
        assert abs(float(scores[mask].min()) - expected[f"batchtopk_k{k}_smallest_kept"]) < 1e-5


def test_top_k_of_sparsify():
    weight, bias = 0.4 * normal(1500, 40, 12), 0.1 * normal(1501, 40)
    x, centre = normal(1504, 9, 12), 0.2 * normal(1503, 12)
    scores = torch.relu((x - centre) @ weight.t() + bias)
    same(gs.keep(scores, gs.TopK(5)), golden("sparsify_topk")["topk_mask"])


def test_statistical_top_k_of_gemma_3n():
    """Its bar depends on the input, so it is a score less the bar, above 0."""
    x = normal(1150, 3, 512)
    mask = gs.keep(x - active.statistical_threshold(x, 256), gs.Threshold(0))
    same(mask, golden("spark_statistical_topk")["nonzero_mask_sparsity0.5"])
