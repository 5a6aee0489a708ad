"""Quantised matrices: kernels against their plain reference, and the reference against plain arithmetic."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import FormatError, NonFiniteError, UsageError
from gossamer.nn import QuantizedLinear
from gossamer.ops import _dispatch
from gossamer.ops import quantized as ops
from gossamer.ops.quantized import QuantizedMatrix, reference

best = _dispatch.kernels().best_isa() if _dispatch.kernels() else -1
ISAS = [name for index, name in enumerate(_dispatch.ISAS) if index <= best]
SHAPES = [(1, 1), (3, 64), (5, 65), (37, 200), (64, 1000), (9, 8300)]


def sparse(rows, cols, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    matrix[torch.rand(rows, cols, generator=generator) > density] = 0
    return matrix


def rows_of(x, matrix, outliers=None):
    """What the kernels must give, in float64: inputs rounded, but not where they meet outliers."""
    exact = torch.zeros_like(matrix)
    if outliers is not None:
        row_ptr, cols, values = outliers
        for row in range(matrix.shape[0]):
            for k in range(int(row_ptr[row]), int(row_ptr[row + 1])):
                exact[row, cols[k]] += values[k]
    rounded = reference.quantize_input(x).double() @ (matrix - exact).double().t()
    return (rounded + x.double() @ exact.double().t()).float()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(isa, bits, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    x, bias = torch.randn(31, shape[1]), torch.randn(shape[0])
    for density, group, symmetric in itertools.product(
        (0, 0.1, 0.6, 1), (64, 128, 512), (True, False)
    ):
        packed = ops.pack(sparse(*shape, density), bits, group, symmetric)
        dense = reference.unpack(
            packed.values, packed.bitmap, packed.scales, packed.zeros, shape[1], group, bits
        )
        assert torch.allclose(ops.unpack(packed), dense, rtol=0, atol=1e-6)
        expected = rows_of(x, dense)
        for batch in (1, 4, 5, 9, 31):
            found = ops.linear(x[:batch], packed, bias)
            near = 1e-4 + 3e-6 * float(expected.abs().max())
            assert torch.allclose(found, expected[:batch] + bias, rtol=1e-4, atol=near)


def even(rows, cols, run, seed=0):
    """A matrix that keeps half of every `run` columns."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols // run, run, generator=generator)
    dropped = torch.rand(matrix.shape, generator=generator).topk(run // 2, dim=-1).indices
    return matrix.scatter(-1, dropped, 0).reshape(rows, cols)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [4, 8])
def test_even_patterns_take_their_own_way_and_give_the_same(isa, bits, size, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    x = torch.randn(14, 8256)
    for rows, cols, symmetric in ((5, 8256, True), (33, 192, False), (32, 64, True)):
        matrix = even(rows, cols, size)
        packed = ops.pack(matrix, bits, 64, symmetric)
        assert packed.balanced == size
        plain = replace(packed, balanced=0)
        assert torch.equal(ops.unpack(packed), ops.unpack(plain))
        for batch in (1, 3, 4, 14):
            part = x[:batch, :cols]
            assert torch.equal(ops.linear(part, packed, None), ops.linear(part, plain, None))
        matrix[0, int(matrix[0].nonzero()[0])] = 0  # one weight that happens to be 0
        again = ops.pack(matrix, bits, 64, symmetric)
        assert again.balanced == size and bool((ops.unpack(again)[matrix == 0] == 0).all())
        matrix[0, :size] = 1.0
        assert ops.pack(matrix, bits, 64, symmetric).balanced == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from([4, 8]),
    st.sampled_from([64, 256]),
    st.booleans(),
    st.integers(0, 99),
)
def test_rounding_is_near_and_zeros_stay(rows, cols, density, bits, group, symmetric, seed):
    matrix = sparse(rows, cols, density, seed)
    found = ops.unpack(ops.pack(matrix, bits, group, symmetric))
    assert bool((found[matrix == 0] == 0).all())
    for first in range(0, cols, group):
        part = matrix[:, first : first + group]
        reach = part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        step = torch.where(part.abs().amax(1) > 0, reach.maximum(part.abs().amax(1) * 2), 0)
        error = (found[:, first : first + group] - part).norm(dim=1)
        allowed = step / (1 << bits) * 0.6 * max(1, part.shape[1]) ** 0.5
        assert bool((error <= allowed + 1e-6).all())


def test_integers_come_back_exactly():
    integers = torch.randint(-8, 8, (6, 256)).float()
    integers[:, ::64] = -8  # the whole range in every group, so that the scale is 1
    mask = torch.rand(6, 256) < 0.5
    mask[:, ::64] = True
    matrix = torch.where(mask & (integers != 0), integers, 0)
    assert torch.equal(ops.unpack(ops.pack(matrix, 4, 64)), matrix)


def test_size_is_what_the_format_says():
    matrix = sparse(512, 1024)
    eight, four = ops.pack(matrix, 8), ops.pack(matrix, 4)
    for packed in (eight, four):  # what rounds to 0 is not kept
        assert packed.kept == int((ops.unpack(packed) != 0).sum()) < int((matrix != 0).sum())
    assert eight.values.numel() == eight.kept + 16
    assert four.kept / 2 + 16 <= four.values.numel() <= 0.55 * four.kept + 16
    assert eight.bitmap.nbytes == 512 * 1024 / 8 and eight.scales.nbytes == 512 * 8 * 2
    assert ops.pack(torch.randn(8, 64), 4).bitmap is None  # nothing to gain from a bitmap


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_densifying_changes_no_weight_and_sparsifying_undoes_it(isa, bits, shape, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    for density, symmetric, outliers in itertools.product((0.1, 0.5), (True, False), (0.0, 0.1)):
        m = ops.pack(sparse(*shape, density), bits, 64, symmetric, outliers)
        if m.bitmap is None:
            continue
        densified = ops.densify(m)
        expected = reference.densify(m.values, m.bitmap, m.zeros, m.shape, m.bits, m.group)
        assert torch.equal(densified.values, expected) and densified.bitmap is None
        assert torch.equal(ops.unpack(densified), ops.unpack(m)) and densified.nonzero == m.kept
        sparsified = ops.sparsify(densified)
        assert torch.equal(sparsified.values, m.values) and torch.equal(sparsified.bitmap, m.bitmap)
        x = torch.randn(3, shape[1])
        found, expected = ops.linear(x, densified, None), ops.linear(x, m, None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_even_patterns_keep_what_rounds_to_zero():
    matrix = torch.randn(8, 256) * (torch.arange(256) % 4 < 2)
    matrix[:, ::8] *= 1e-3
    m = ops.pack(matrix, 4)
    assert m.balanced == 4 and m.kept == 8 * 128 > int((ops.unpack(m) != 0).sum())


def test_a_densified_layer_is_sparse_in_state_dicts():
    layer = QuantizedLinear.from_matrix(sparse(33, 150), torch.randn(33), bits=4)
    x = torch.randn(5, 150)
    before = {name: part.clone() for name, part in layer.state_dict().items()}
    kept, expected = layer.kept, layer(x)
    layer.densify()
    layer.densify()
    assert layer.bitmap is None and layer.matrix.nbytes > layer.stored.nbytes
    assert layer.kept == kept and layer.sparse
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    after = layer.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], part) for name, part in before.items())
    layer.bfloat16().float().load_state_dict(before)
    assert layer.bitmap is not None and torch.equal(layer(x), expected)
    dense = QuantizedLinear.from_matrix(torch.randn(33, 150), bits=4)
    dense.densify()
    dense.sparsify()
    assert dense.bitmap is None and not dense.sparse and dense.density == 1.0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_other_zeros_may_be_loaded_into_a_layer(bits, outliers):
    matrix = sparse(34, 150)
    one, other = (
        QuantizedLinear.from_matrix(each, bits=bits, outliers=outliers, symmetric=False)
        for each in (matrix, matrix.reshape(17, 2, 150).flip(0).reshape(34, 150).contiguous())
    )
    one.densify()
    x = torch.randn(3, 150)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(x), other(x))
    before = {name: part.clone() for name, part in one.state_dict().items()}
    with pytest.raises(FormatError):
        one.load_state_dict({**before, "bitmap": torch.zeros_like(one.bitmap)})
    assert all(torch.equal(one.state_dict()[name], part) for name, part in before.items())


def at_odd_address(part):
    room = torch.zeros(part.numel() + 8, dtype=torch.uint8)
    return room[-room.data_ptr() % 8 + 1 :][: part.numel()].view_as(part).copy_(part)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_parts_may_lie_anywhere(isa, bits, monkeypatch):
    """Where a file puts them; what reads bitmaps as words is seen by `make sanitize`."""
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    halves = torch.randn(5, 128) * (torch.arange(128) % 4 < 2)  # of every 4, which has its kernel
    for matrix in (sparse(9, 130), halves):
        m = ops.pack(matrix, bits, 64)
        odd = [at_odd_address(part) for part in (m.values, m.bitmap)]
        again = QuantizedMatrix.of(*odd, m.scales, m.zeros, None, m.shape, bits, 64)
        assert again.bitmap.data_ptr() % 8 == 1 and again.balanced == m.balanced
        assert torch.equal(ops.unpack(again), ops.unpack(m))
        for rows in (1, 5, 20):
            x = torch.randn(rows, matrix.shape[1])
            assert torch.equal(ops.linear(x, again, None), ops.linear(x, m, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_outliers_are_exact(isa, density, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    matrix = sparse(20, 300, density)
    matrix[:, 7] *= 100
    packed = ops.pack(matrix, 4, 128, outliers=0.02)
    found = ops.unpack(packed)
    assert torch.equal(found[:, 7], matrix[:, 7])
    assert (found - matrix).norm() < 0.2 * (ops.unpack(ops.pack(matrix, 4, 128)) - matrix).norm()
    for rows in (3, 29):
        x = torch.randn(rows, 300)
        expected = rows_of(x, found, packed.outliers)
        assert torch.allclose(ops.linear(x, packed, None), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
def test_threads_batches_and_dtypes(isa, over_threads, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    packed = ops.pack(sparse(301, 520), 4)
    x = torch.randn(2, 6, 520)
    many = ops.linear(x, packed, None)
    few = torch.cat([ops.linear(x[0], packed, None), ops.linear(x[1], packed, None)])
    assert torch.allclose(many.flatten(0, 1), few, rtol=1e-4, atol=1e-4)
    one, *others = over_threads(lambda: ops.linear(x[0, :2], packed, None))
    if isa != "reference":  # torch's own product may sum in another order with other threads
        assert all(torch.equal(one, other) for other in others)
    half = ops.linear(x[0, :1].bfloat16(), packed, None)
    wide = ops.linear(x[0, :1].bfloat16().float(), packed, None)
    assert half.dtype == torch.bfloat16 and torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_inputs_poison_what_they_reach(isa, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    packed = ops.pack(sparse(6, 256), 8)
    for value in (torch.nan, torch.inf):
        x = torch.randn(1, 256)
        x[0, 3] = value
        assert bool(torch.isnan(ops.linear(x, packed, None)).all())
    assert bool((ops.linear(torch.zeros(1, 256), packed, None) == 0).all())


def test_opcheck_and_gradients():
    packed = ops.pack(sparse(12, 130), 4, 64, symmetric=False, outliers=0.05)
    bias = torch.randn(12, requires_grad=True)
    x = torch.randn(3, 130, requires_grad=True)
    arguments = (x, bias, packed.values, packed.offsets, packed.bitmap, packed.scales, packed.zeros,
                 *packed.outliers, [12, 130], 4, 64, 0)  # fmt: skip
    torch.library.opcheck(torch.ops.gossamer.quantized_linear.default, arguments)
    ops.linear(x, packed, bias).sum().backward()
    assert torch.allclose(x.grad, ops.unpack(packed).sum(0).expand(3, -1), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((12,), 3.0))


@pytest.mark.parametrize("isa", ["native", "reference"])
def test_bad_input(isa, monkeypatch):
    if isa == "reference":
        monkeypatch.setenv("GOSSAMER_ISA", isa)
    with pytest.raises(UsageError, match="bits is 4 or 8"):
        ops.pack(sparse(4, 64), 3)
    with pytest.raises(UsageError, match="power of two"):
        ops.pack(sparse(4, 64), 4, 96)
    with pytest.raises(UsageError, match="outliers"):
        ops.pack(sparse(4, 64), 4, outliers=0.7)
    with pytest.raises(NonFiniteError):
        ops.pack(torch.full((4, 64), torch.nan), 4)
    with pytest.raises(UsageError, match="width 64"):
        ops.linear(torch.randn(1, 65), ops.pack(sparse(4, 64), 4), None)


def damaged(**changes):
    packed = ops.pack(sparse(6, 200), 4, 64, symmetric=False, outliers=0.05)
    parts = {
        "values": packed.values,
        "bitmap": packed.bitmap,
        "scales": packed.scales,
        "zeros": packed.zeros,
        "outliers": packed.outliers,
        "shape": packed.shape,
        "bits": packed.bits,
        "group": packed.group,
    }
    parts.update({key: change(parts[key]) for key, change in changes.items()})
    return QuantizedMatrix.of(**parts)


def offsets(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": lambda v: v[:-1]},
        {"values": lambda v: v.float()},
        {"bitmap": lambda b: b | 128},
        {"bitmap": lambda b: b[:, :-8]},
        {"bitmap": lambda b: torch.zeros_like(b)},
        {"scales": lambda s: s[:, :-1]},
        {"scales": lambda s: s.float()},
        {"zeros": lambda z: z + 16},
        {"zeros": lambda z: z[:-1]},
        {"bits": lambda _: 5},
        {"group": lambda _: 96},
        {"group": lambda _: 0},
        {"shape": lambda s: (s[0], s[1] + 64)},
        {"outliers": lambda o: (o[0] + 1, o[1], o[2])},
        {"outliers": lambda o: (o[0].flip(0), o[1], o[2])},
        {"outliers": lambda o: (offsets(0, 2**63 - 1, -2, *o[0][3:].tolist()), o[1], o[2])},
        {"outliers": lambda o: (offsets(0, 99, *o[0][2:].tolist()), o[1], o[2])},
        {"outliers": lambda o: (o[0], o[1] + 200, o[2])},
        {"outliers": lambda o: (o[0], o[1] - 300, o[2])},
        {"outliers": lambda o: (o[0], o[1], o[2].double())},
    ],
)
def test_contradicting_parts_are_refused(changes):
    damaged()
    with pytest.raises(FormatError):
        damaged(**changes)


def test_a_module_keeps_its_integers_through_dtypes():
    layer = QuantizedLinear.from_matrix(sparse(20, 130), torch.randn(20), bits=4)
    x = torch.randn(1, 130)
    before = layer(x)
    layer.double().float()
    assert layer.scales.dtype == torch.bfloat16 and torch.equal(layer(x), before)
    assert layer.bfloat16().bias.dtype == torch.bfloat16
    again = QuantizedLinear.from_matrix(sparse(20, 130, seed=1), torch.zeros(20), bits=4)
    assert layer.kept == int((layer.to_matrix() != 0).sum())
    assert set(again.state_dict()) == set(layer.state_dict())
