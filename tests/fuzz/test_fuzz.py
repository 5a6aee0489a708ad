"""Random damage to stored models and to packed layers: one of our errors, or the same model.

FUZZ_SECONDS (3 by default) is the time for each fuzzer, FUZZ_SEED (0) where it begins: `make test`
tries the same damage every time, `make fuzz` another.
"""

import copy
import json
import os
import random
import shutil
import time

import pytest
import torch

import gossamer as gs
from gossamer.core.errors import FormatError, UsageError
from gossamer.core.matrix import as_matrix
from gossamer.nn import BitmapLinear, NMLinear, PackedConv2d, QuantizedLinear, prepare_large_batches
from gossamer.ops import attention, kv_tiles, nm, quantized
from gossamer.ops import bitmap as ops
from gossamer.ops.bitmap import reference as bitmap_reference
from gossamer.ops.nm import reference as nm_reference
from gossamer.ops.quantized import QuantizedMatrix, reference

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 70, bias=False)]
    return torch.nn.Sequential(*layers).eval()


def rounds(shared=1):
    """Seeds until the time is over, shared by so many, ten at least; the failing one is in the
    assertion."""
    start, index = time.monotonic(), SEED
    while time.monotonic() - start < SECONDS / shared or index < SEED + 10:
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


WIDTHS = {1: ["U8", "I8", "BOOL"], 2: ["BF16", "F16", "U16", "I16"], 4: ["F32", "U32", "I32"],
          8: ["F64", "U64", "I64"]}  # fmt: skip
"""safetensors' names of dtypes by their bytes."""


def lie(data, rng):
    """One tensor of a safetensors file with other numbers, another dtype or another shape, which
    the file's own checks cannot notice."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    width = next(n for n, names in WIDTHS.items() if entry["dtype"] in names)
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    count, kind = (end - begin) // width, rng.randrange(4)
    if kind == 0:
        entry["dtype"] = rng.choice(WIDTHS[width])
    elif kind == 1:
        entry["shape"] = rng.choice([shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1]])
    else:
        top = 1 << 8 * width - 1
        first = rng.randrange(count)
        for at in range(first, min(count, first + rng.choice([1, 1, 2, 3]))):
            number = rng.choice([0, 1, 2, top - 1, top, 2 * top - 2, 2 * top - 1])
            place = begin + at * width
            body[place : place + width] = number.to_bytes(width, "little")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def hurt(file, rng):
    """Damage of either kind."""
    data = file.read_bytes()
    hidden = file.suffix == ".safetensors" and rng.random() < 0.5
    file.write_bytes(lie(data, rng) if hidden else damage(data, rng))


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
            prepare_large_batches(layer)
        x = torch.randn(rng.choice([1, 2, 5, 8, 9, 40, 70]), width, generator=generator)
        expected = x @ layer.to_matrix().float().t()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4, msg=f"{seed}")


INTEGERS = [(4, True, 0.0), (4, False, 0.05), (8, True, 0.1), (8, False, 0.0)]
"""Bits, symmetric, outliers."""


def bitmaps():
    network = model()
    gs.prune(network, gs.weights.Magnitude(), density=0.4)
    return gs.compress(network).model, model


def integers(bits, symmetric, outliers):
    """Integer layers, one sparse and one dense, and the same model with nothing in it."""
    network = model()
    gs.prune(network, gs.weights.Magnitude(), density=0.4, exclude=("2",))
    for name in "02":
        layer = network.get_submodule(name)
        packed = QuantizedLinear.from_matrix(
            layer.weight, layer.bias, bits=bits, group=64, symmetric=symmetric, outliers=outliers
        )
        network.set_submodule(name, packed)
    return network, model


def nm_layers(keep, group, dtype):
    """Both layers N:M, though a bitmap might be smaller."""
    network, pattern = model().to(dtype), f"{keep}:{group}"
    gs.prune(network, gs.weights.Magnitude(), pattern=gs.NM(keep, group))
    for name in "02":
        layer = network.get_submodule(name)
        network.set_submodule(name, NMLinear.from_matrix(layer.weight, layer.bias, pattern))
    return network, model


def convolutions():
    """With and without stride, padding, larger kernels and a bias; one depthwise between."""

    def empty():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 24, 1),
            torch.nn.Conv2d(24, 24, 3, 1, 1, groups=24),
            torch.nn.Conv2d(24, 10, (3, 2), (1, 2), bias=False),
        ).eval()  # fmt: skip

    network = empty()
    for name in "024":
        conv = network.get_submodule(name)
        conv.weight.data[torch.rand_like(conv.weight) > 0.2] = 0
        packed = BitmapLinear.from_matrix(as_matrix(conv), conv.bias)
        network.set_submodule(name, PackedConv2d.from_conv(conv, packed))
    return network, empty


def zeros():
    """No packed layer at all: tensors of three kinds that are stored by their zeros."""

    def empty():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Unflatten(1, (8, 3)),
            torch.nn.Conv1d(8, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16, 9),
        ).eval()  # fmt: skip

    network = empty()
    for index in (0, 3, 5):
        weight = network[index].weight
        weight.data *= torch.rand_like(weight) < 0.3
    return network, empty


STORED = {
    "bitmap": bitmaps,
    "zeros": zeros,
    **{f"int{b} {s} {o}": lambda k=(b, s, o): integers(*k) for b, s, o in INTEGERS},
    "2:4": lambda: nm_layers(2, 4, torch.float32),
    "3:8": lambda: nm_layers(3, 8, torch.bfloat16),
    "convolutions": convolutions,
}


@pytest.fixture(scope="module", params=STORED, ids=str)
def stored(request, tmp_path_factory):
    """A folder, the function that makes the empty model, and what the saved one gives for x."""
    network, empty = STORED[request.param]()
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 9, 11) if request.param == "convolutions" else (3, 40)
    x = torch.randn(shape, generator=generator)
    folder = tmp_path_factory.mktemp("stored") / "model"
    gs.save(network, folder)
    with torch.inference_mode():
        return folder, empty, x, gs.load(folder, model=empty())(x)


def quick(folder, empty):
    """Without digests, which would notice all damage: the other checks are to stand alone."""
    return gs.load(folder, model=empty(), verify=False)


def test_damaged_folders_end_in_one_error_or_a_model_that_runs(stored, tmp_path):
    """Damage to the file is refused, or it changed numbers only: then the kernel must give what
    the plain decoder gives for the numbers that are there now."""
    folder, empty, x, right = stored
    refused = 0
    for seed, rng in rounds(len(STORED)):
        place = tmp_path / "copy"
        shutil.copytree(folder, place)
        victim = rng.choice([place / "gossamer.safetensors"] * 3 + [place / "gossamer.json"])
        before = victim.read_bytes()
        hurt(victim, rng)
        weights = victim.suffix == ".safetensors"
        if weights and victim.read_bytes() != before:
            with pytest.raises(FormatError):
                gs.load(place, model=empty())
        start = time.process_time()
        try:
            found = quick(place, empty)
        except (FormatError, UsageError) as error:
            refused += 1
            assert str(error) and "\n" not in str(error), f"FUZZ_SEED={seed}"
        else:
            for layer in found:
                check(layer, seed)
            with torch.inference_mode():
                y = found(x)
            assert y.shape == right.shape, f"FUZZ_SEED={seed}"
            if victim.read_bytes() == before:
                assert torch.equal(y, right), f"FUZZ_SEED={seed}"
        assert time.process_time() - start < 5, f"FUZZ_SEED={seed}"
        shutil.rmtree(place)
    assert refused > 0


SCALARS = [0, -1, 1, 2, 40, 64, 1 << 20, 2**31 - 1, 2**31, 2**63, 0.5, 1e400, None, True, False]
WORDS = ["values", "bitmap", "nm", "2:4", "31:32", "block:16x40", "block:999999x1", "int4", "int8",
         "float32", "bfloat16", "", "0", "..", "a/b", "\0", "é" * 300]  # fmt: skip


def anything(rng, depth=0):
    """A number or word, or lists and objects of such."""
    if depth > 3 or rng.random() < 0.4:
        return rng.choice([*SCALARS, *WORDS])
    if rng.random() < 0.5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def test_manifests_that_say_anything(stored, tmp_path):
    """Nothing is allocated by what a manifest says before the files agree with it."""
    folder, empty, x, right = stored
    facts = json.loads((folder / "gossamer.json").read_text())
    shutil.copytree(folder, tmp_path / "copy")
    for seed, rng in rounds(len(STORED)):
        said = copy.deepcopy(facts)
        section = said["layers"] or said["stored"]
        layer = section[rng.choice(list(section))]
        place = rng.choice([said, layer, layer, layer, layer["shape"], layer["shape"]])
        key = rng.randrange(2) if isinstance(place, list) else rng.choice([*place, "storage"])
        place[key] = anything(rng, 3 * rng.randrange(2))
        (tmp_path / "copy" / "gossamer.json").write_text(json.dumps(said))
        try:
            found = quick(tmp_path / "copy", empty)
        except (FormatError, UsageError) as error:
            assert str(error) and "\n" not in str(error), f"FUZZ_SEED={seed}"
        else:
            with torch.inference_mode():
                assert torch.equal(found(x), right), f"FUZZ_SEED={seed}"


def check(layer, seed):
    """Whatever the numbers are, the kernels give what plain arithmetic gives."""
    if isinstance(layer, BitmapLinear):
        check_bitmap(layer, seed)
    elif isinstance(layer, QuantizedLinear):
        check_integers(layer, seed)
    elif isinstance(layer, NMLinear):
        check_nm(layer, seed)
    elif isinstance(layer, PackedConv2d):
        check_convolution(layer, seed)


def check_bitmap(layer, seed):
    parts = (layer.values, layer.bitmap, layer.bias, layer.in_features)
    for rows in (3, 12):
        x = torch.randn(rows, layer.in_features)
        plain = bitmap_reference.linear(x, *parts)
        compare(layer(x), plain, x, (layer.values,), layer.bias, seed)


def check_nm(layer, seed):
    parts = (layer.values, layer.codes)
    dense, found = nm_reference.unpack(*parts, layer.layout), layer.to_matrix()
    torch.testing.assert_close(found, dense, rtol=0, atol=0, equal_nan=True, msg=f"{seed}")
    for rows in (3, 12):  # the kernels of one row and of many
        x = torch.randn(rows, layer.in_features)
        plain = nm_reference.linear(x, *parts, layer.bias, layer.layout)
        compare(layer(x), plain, x, (dense,), layer.bias, seed)


def check_convolution(layer, seed):
    high, wide = layer.window.kernel
    dense = layer.to_matrix().float()
    weight = dense.reshape(dense.shape[0], high, wide, -1).permute(0, 3, 1, 2)
    x = torch.randn(1, weight.shape[1], 7, 6)
    bias = None if layer.bias is None else layer.bias.float()
    plain = torch.nn.functional.conv2d(x, weight, bias, layer.window.stride, layer.window.padding)
    compare(layer(x), plain, x.reshape(1, -1), (dense,), bias, seed)


def check_integers(layer, seed):
    m, x = layer.matrix, torch.randn(3, layer.in_features)
    parts = (m.values, m.bitmap, m.scales, m.zeros, layer.in_features, m.group, m.bits)
    dense = reference.unpack(*parts, m.outliers)
    found = layer.to_matrix()
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=0, equal_nan=True, msg=f"{seed}")
    plain = reference.linear(x, dense, m.outliers, layer.bias)
    largest = m.scales.float() * 2**m.bits  # kernels add and take away what a group could hold
    compare(layer(x), plain, x, (dense, largest), layer.bias, seed)


def compare(found, expected, x, factors, bias, seed):
    """Equal to the rounding of sums of so large factors times x, whatever their order; where sums
    may overflow, the shape alone."""
    assert found.shape == expected.shape, f"FUZZ_SEED={seed}"
    reach = sum(float(part.abs().max()) for part in factors if part.numel())
    size = reach * float(x.abs().sum(1).max()) + (0 if bias is None else float(bias.abs().max()))
    if not size < 1e30:
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * size, msg=f"FUZZ_SEED={seed}")


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


def test_random_nm_is_refused_or_multiplies_right():
    """Any codes and values, straight into the layer that checks them."""
    refused = 0
    for seed, rng in rounds():
        generator = torch.Generator().manual_seed(seed)
        group = rng.choice(nm.GROUPS)
        keep, out, width = rng.randrange(1, group), rng.randrange(1, 20), rng.randrange(1, 300)
        matrix = torch.randn(out, width, generator=generator)
        matrix[:, torch.arange(width) % group >= keep] = 0
        matrix = matrix.to(rng.choice([torch.float32, torch.bfloat16]))
        values, codes = nm.pack(matrix, keep, group)
        part = rng.choice([codes, codes, values])
        kind = rng.randrange(4)
        if kind == 1:
            part.view(torch.uint8).view(-1)[rng.randrange(part.nbytes)] = rng.randrange(256)
        elif kind == 2:
            codes.random_(0, 256, generator=generator)
        width += rng.choice([0, 0, 0, 1, -1, group])
        pattern = f"{keep}:{group}" if kind != 3 else rng.choice(["2:4", "4:8", "1:32", "5:7"])
        try:
            layer = NMLinear(values, codes, width, out, None, pattern)
        except (FormatError, UsageError):
            refused += 1
            continue
        if rng.random() < 0.5:
            prepare_large_batches(layer)
        check_nm(layer, seed)
    assert refused > 0


def random_lists(rng, rows, limit):
    """Sorted lists, of which one number or one offset may be any."""
    found = [sorted(rng.sample(range(limit), rng.randrange(limit + 1))) for _ in range(rows)]
    offsets = torch.tensor([0, *map(len, found)]).cumsum(0)
    columns = torch.tensor([c for row in found for c in row], dtype=torch.int32)
    for part in (columns, offsets):
        if part.numel() and rng.random() < 0.15:
            part[rng.randrange(part.numel())] = rng.choice([-1, 0, 1, limit, 2**31 - 1])
    return offsets.reshape(1, 1, -1), columns


def test_random_attention_is_refused_or_right():
    """Any lists, straight into the layout and the decoder that check them."""
    refused = 0
    for seed, rng in rounds():
        generator = torch.Generator().manual_seed(seed)
        queries, keys = rng.randrange(1, 70), rng.randrange(1, 70)
        rows, columns, group = (rng.choice([1, 5, 16, 64]) for _ in range(3))
        tiles = random_lists(rng, -(-queries // rows), -(-keys // columns))
        tokens = random_lists(rng, -(-queries // group), rng.randrange(1, keys + 1))
        index = torch.tensor([[[rng.randrange(-1, keys + 1) for _ in range(rng.randrange(4))]]])
        parts = [torch.randn(1, 2, n, 20, generator=generator) for n in (queries, keys, keys)]
        try:
            if rng.random() < 0.2:
                found = attention.decode(*parts, index.expand(1, 2, -1).long())
                exact = attention.decode(
                    *(x.double() for x in parts), index.expand(1, 2, -1).long()
                )
            else:
                layout = attention.Layout(queries, keys, *tiles, rows, columns)
                if rng.random() < 0.5:
                    empty = attention.Layout.empty(queries, keys, group)
                    layout = empty.with_tokens(*tokens, group)
                causal = rng.random() < 0.5
                found = attention.attention(*parts, layout, causal=causal)
                exact = attention.attention(*(x.double() for x in parts), layout, causal=causal)
        except UsageError:
            refused += 1
            continue
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=f"{seed}")
    assert refused > 0


def test_damaged_tiles_are_refused_or_right():
    """Bits, offsets and lengths of tiled keys and values, and widths that are another's."""
    refused = 0
    for seed, rng in rounds():
        generator = torch.Generator().manual_seed(seed)
        width, heads = rng.choice([5, 20, 64, 70]), rng.choice([1, 2])
        x = torch.randn(1, heads, 64 * rng.choice([1, 2]), width, generator=generator)
        tiles = [kv_tiles.pack(x, x > rng.choice([-1, 0, 2]), keys=keys) for keys in (True, False)]
        at, part = rng.randrange(2), rng.randrange(4)
        parts = [p.clone() for p in tiles[at].parts]
        if part < 2 and parts[part].numel():
            place = rng.randrange(parts[part].numel())
            parts[part].view(-1)[place] ^= 1 << rng.randrange(31)
        elif part == 2:
            parts[2] = parts[2][: rng.randrange(parts[2].numel() + 1)]
        query, tail = (torch.randn(1, heads, n, width, generator=generator) for n in (1, 3))
        try:
            wide = width + (rng.choice([-1, 1]) if part == 3 else 0)
            tiles[at] = kv_tiles.Tiles(*parts, wide, tiles[at].keys)
            found = kv_tiles.decode(query, tiles[:1], tiles[1:], tail, tail)
        except (FormatError, UsageError):
            refused += 1
            continue
        both = [torch.cat([kv_tiles.unpack(one), tail], 2) for one in tiles]
        exact = torch.nn.functional.scaled_dot_product_attention(query, *both)
        torch.testing.assert_close(found[0], exact, rtol=1e-4, atol=1e-4, msg=f"{seed}")
    assert refused > 0
