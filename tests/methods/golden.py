"""Reads `tests/golden`: outputs of the authors' released code on seeded inputs."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "golden"


def load(name):
    """The record of one method."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def draw(inputs, name):
    """The float32 tensor that a recipe of seed, distribution, shape and factor stands for."""
    entry = inputs[name]
    recipe = r"numpy\.random\.default_rng\((\d+)\)\.(\w+)\(\(([\d, ]+)\)\)"
    seed, kind, shape = re.match(recipe, entry["recipe"]).groups()
    sizes = tuple(int(n) for n in shape.split(",") if n.strip())
    values = getattr(np.random.default_rng(int(seed)), kind)(sizes).astype(np.float32)
    if factor := re.match(r"times float32\(([\d.]+)\)", entry.get("then", "")):
        values = values * np.float32(factor[1])
    assert list(values.shape) == entry["shape"]
    return torch.tensor(values)


def digest(mask):
    """The hash that the records use for a mask."""
    packed = np.packbits(mask.contiguous().numpy().astype(bool).ravel())
    return hashlib.sha256(packed.tobytes()).hexdigest()


def is_mask(found, want):
    """Whether a mask is the recorded one, entry by entry."""
    count = want.get("true_count", want.get("count_true"))
    return int(found.sum()) == count and digest(found) == want.get(
        "packed_sha256", want.get("sha256_packbits")
    )


def close(found, want):
    """Assert that a tensor is the recorded one: all its values, or their sum, norm and first."""
    if "values" in want:
        expected = torch.tensor(want["values"], dtype=found.dtype)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        return
    flat = found.double().flatten()
    assert abs(float(flat.sum()) - want["sum"]) <= 1e-4 * float(flat.abs().sum())
    assert abs(float(flat.norm()) - want["l2"]) <= 1e-4 * want["l2"]
    expected = torch.tensor(want["first12"], dtype=torch.double)
    torch.testing.assert_close(flat[: len(expected)], expected, rtol=1e-4, atol=1e-6)
