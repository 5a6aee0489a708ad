"""Random damage to stored models and to packed layers: one of our errors, or the same model.

FUZZ_SECONDS (3 by default) is the time for each fuzzer; FUZZ_SEED repeats a run.
"""

import json
import os
import random
import shutil
import time

import pytest
import torch

import gossamer as gs
from gossamer.core.errors import FormatError, UsageError
from gossamer.nn import BitmapLinear, QuantizedLinear, prepare_batches
from gossamer.ops import bitmap as ops
from gossamer.ops import quantized
from gossamer.ops.quantized import QuantizedMatrix, reference

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("FUZZ_SEED", str(time.time_ns() % 1_000_000)))


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 70, bias=False)]
    return torch.nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    network = model()
    gs.prune(network, gs.Magnitude(), density=0.4)
    gs.save(gs.compress(network), folder)
    return folder


def rounds(shared=1):
    """Seeds until the time is over, shared by so many; the failing one is in the assertion."""
    start, index = time.monotonic(), SEED
    while time.monotonic() - start < SECONDS / shared:
        yield index, random.Random(index)
        index += 1


def damage(data, rng):
    """Bytes flipped, cut, doubled, moved or replaced."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(64)]
        elif kind == 3:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7])
        elif kind == 4:
            data[at : at + 1] = str(10 ** rng.randrange(30)).encode()
        else:
            other = rng.randrange(len(data)) if data else 0
            data[at : at + 4], data[other : other + 4] = data[other : other + 4], data[at : at + 4]
    return bytes(data)


def test_damaged_folders_end_in_one_error_or_a_model_that_runs(saved, tmp_path):
    refused = 0
    for seed, rng in rounds():
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        files = sorted(p for p in copy.iterdir() if p.is_file())
        victim = rng.choice(files)
        victim.write_bytes(damage(victim.read_bytes(), rng))
        start = time.monotonic()
        try:
            found = gs.load(copy, model=model())
        except (FormatError, UsageError) as error:
            refused += 1
            assert str(error) and "\n" not in str(error), f"FUZZ_SEED={seed}"
        else:
            assert found(torch.randn(12, 40)).shape == (12, 70), f"FUZZ_SEED={seed}"
        assert time.monotonic() - start < 5, f"FUZZ_SEED={seed}"
        shutil.rmtree(copy)
    assert refused > 0


def test_random_manifests(saved, tmp_path):
    words = ["values", "bitmap", "", "0", "..", "a/b", "\0", "é" * 300]
    for seed, rng in rounds():

        def value(depth, rng=rng):
            if depth > 3:
                return rng.choice([0, -1, 2**63, 1e400, None, True, *words])
            if rng.random() < 0.5:
                return [value(depth + 1) for _ in range(rng.randrange(4))]
            return {rng.choice(words): value(depth + 1) for _ in range(rng.randrange(4))}

        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        facts = json.loads((copy / "gossamer.json").read_text())
        place = rng.choice(["layers", "version", "format", "provenance", "method", "0"])
        if place == "0" and facts["layers"]:
            layer = facts["layers"][rng.choice(list(facts["layers"]))]
            layer[rng.choice(list(layer))] = value(0)
        else:
            facts[place] = value(0)
        (copy / "gossamer.json").write_text(json.dumps(facts))
        try:
            gs.load(copy, model=model())
        except (FormatError, UsageError) as error:
            assert str(error), f"FUZZ_SEED={seed}"
        shutil.rmtree(copy)


def test_random_bitmaps_are_refused_or_multiply_right():
    """Also what the sanitizers watch: nothing may be read outside the arrays."""
    for seed, rng in rounds():
        out, width = rng.randrange(1, 20), rng.randrange(1, 200)
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(out, width, generator=generator) < rng.choice([0.05, 0.5, 0.95])
        bitmap, count = ops.pack(mask.float())[1], int(mask.sum())
        if rng.random() < 0.3:  # any byte, padding too
            row, byte = rng.randrange(out), rng.randrange(bitmap.shape[1])
            bitmap[row, byte] = rng.randrange(256)
        count += rng.choice([0, 0, 0, 1, -1])
        dtype = rng.choice([torch.float32, torch.bfloat16])
        values = torch.randn(max(0, count), generator=generator).to(dtype)
        try:
            layer = BitmapLinear(values, bitmap, width, out)
        except (FormatError, UsageError):
            continue
        if rng.random() < 0.5:
            prepare_batches(layer)
        x = torch.randn(rng.choice([1, 2, 5, 8, 9, 40, 70]), width, generator=generator)
        expected = x @ layer.to_matrix().float().t()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4, msg=f"{seed}")


INTEGERS = [(4, True, 0.0), (4, False, 0.05), (8, True, 0.1), (8, False, 0.0)]
"""Bits, symmetric, outliers."""


@pytest.fixture(scope="module", params=INTEGERS, ids=str)
def saved_integers(request, tmp_path_factory):
    """A folder of integer layers, one sparse and one dense, and what the model gives."""
    bits, symmetric, outliers = request.param
    network, x = model(), torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    gs.prune(network, gs.Magnitude(), density=0.4, exclude=("2",))
    for name in "02":
        layer = network.get_submodule(name)
        packed = QuantizedLinear.from_matrix(
            layer.weight, layer.bias, bits=bits, group=64, symmetric=symmetric, outliers=outliers
        )
        network.set_submodule(name, packed)
    folder = tmp_path_factory.mktemp("integers") / "model"
    gs.save(network, folder)
    return folder, x, network(x)


def test_damaged_integers_end_in_one_error_or_a_model_that_runs(saved_integers, tmp_path):
    """Damage to the file is refused, or it changed numbers only: then the kernel must give what
    the plain decoder gives for the numbers that are there now."""
    folder, x, right = saved_integers
    refused = 0
    for seed, rng in rounds(len(INTEGERS)):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        victim = rng.choice([copy / "model.safetensors"] * 3 + [copy / "gossamer.json"])
        before = victim.read_bytes()
        victim.write_bytes(damage(before, rng))
        try:
            found = gs.load(copy, model=model())
        except (FormatError, UsageError) as error:
            refused += 1
            assert str(error) and "\n" not in str(error), f"FUZZ_SEED={seed}"
        else:
            for layer in (found[0], found[2]):
                check_integers(layer, seed)
            if victim.read_bytes() == before:
                assert torch.equal(found(x), right), f"FUZZ_SEED={seed}"
        shutil.rmtree(copy)
    assert refused > 0


def check_integers(layer, seed):
    """Whatever the numbers are, the kernels give what the plain decoder gives."""
    m, x = layer.matrix, torch.randn(3, layer.in_features)
    parts = (m.values, m.bitmap, m.scales, m.zeros, layer.in_features, m.group, m.bits)
    dense = reference.unpack(*parts, m.outliers)
    found = layer.to_matrix()
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=0, equal_nan=True, msg=f"{seed}")
    assert layer(x).shape == (3, layer.out_features), f"FUZZ_SEED={seed}"
    if dense.numel() and not float(dense.abs().max()) < 1e18:  # sums may overflow in one only
        return
    expected = reference.linear(x, dense, m.outliers, layer.bias)
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3 * scale, msg=f"{seed}")


def test_random_integers_are_refused_or_multiply_right():
    """Parts that contradict each other, straight into the decoder that checks them."""
    refused = 0
    for seed, rng in rounds():
        generator = torch.Generator().manual_seed(seed)
        out, width = rng.randrange(1, 20), rng.randrange(1, 300)
        bits, group = rng.choice([4, 8]), rng.choice([64, 128])
        matrix = torch.randn(out, width, generator=generator)
        matrix *= torch.rand(out, width, generator=generator) < rng.choice([0.1, 0.6, 1.0])
        good = quantized.pack(matrix, bits, group, rng.random() < 0.5, rng.choice([0.0, 0.1]))
        parts = [good.values, good.bitmap, good.scales, good.zeros, good.outliers]
        at = rng.randrange(5)
        part = parts[at]
        if isinstance(part, tuple):
            held = [p.clone() for p in part]
            one = rng.choice(held)
            if one.numel():
                one.view(-1)[rng.randrange(one.numel())] = rng.choice([-1, 0, 1, 300, 2**31 - 1])
            parts[at] = tuple(held)
        elif part is not None and part.numel():
            raw = part.clone()
            raw.view(torch.uint8).view(-1)[rng.randrange(raw.nbytes)] = rng.randrange(256)
            parts[at] = raw if rng.random() < 0.7 else raw.view(-1)[: rng.randrange(raw.numel())]
        shape = (out, width + rng.choice([0, 0, 0, 1, -1, 64]))
        try:
            found = QuantizedMatrix.of(*parts, shape, rng.choice([bits, bits, 4, 8]), group)
        except (FormatError, UsageError):
            refused += 1
            continue
        check_integers(QuantizedLinear(found), seed)
    assert refused > 0
