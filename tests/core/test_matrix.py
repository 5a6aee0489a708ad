"""Layers seen as matrices: orientation, round trip, and agreement with the layer's own forward."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gossamer.core.errors import UsageError
from gossamer.core.matrix import (
    Weight,
    as_matrix,
    inputs_of,
    is_prunable,
    why_not_plain,
    write_matrix,
)


def conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    return pytorch_utils.Conv1D(6, 10)


def conv(kind, *sizes, **options):
    return kind(4, 6, *sizes, **options)


LAYERS = {
    "linear": lambda: (nn.Linear(10, 6), torch.randn(3, 5, 10)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), torch.randn(2, 4, 9, 8)),
    "conv1d": lambda: (conv1d(), torch.randn(3, 5, 10)),
    "valid": lambda: (conv(nn.Conv2d, 3, padding="valid"), torch.randn(2, 4, 7, 6)),
    "same": lambda: (conv(nn.Conv2d, (4, 3), padding="same"), torch.randn(2, 4, 7, 6)),
    "dilated": lambda: (
        conv(nn.Conv2d, 2, padding="same", dilation=3, padding_mode="circular"),
        torch.randn(2, 4, 7, 6),
    ),
    "reflect": lambda: (
        conv(nn.Conv2d, (3, 2), stride=2, padding=(1, 2), padding_mode="reflect"),
        torch.randn(2, 4, 7, 6),
    ),
    "replicate": lambda: (
        conv(nn.Conv1d, 5, padding=2, padding_mode="replicate"),
        torch.randn(2, 4, 9),
    ),
    "one image": lambda: (conv(nn.Conv2d, 3, padding=1), torch.randn(4, 7, 6)),
    "tokens": lambda: (conv(nn.Conv1d, 3, stride=2, dilation=2), torch.randn(2, 4, 9)),
    "volume": lambda: (conv(nn.Conv3d, (1, 2, 3), padding=1), torch.randn(2, 4, 3, 4, 5)),
}
WEIGHTS = {
    "grouped": lambda: Weight(nn.Conv2d(8, 6, (3, 2), groups=2)),
    "transposed": lambda: Weight(nn.ConvTranspose2d(4, 6, (3, 2))),
    "transposed, grouped": lambda: Weight(nn.ConvTranspose1d(4, 6, 3, groups=2)),
    "bilinear": lambda: Weight(nn.Bilinear(3, 4, 5)),
    "recurrent": lambda: Weight(nn.LSTM(3, 4), "weight_hh_l0"),
    "a third": lambda: Weight(nn.MultiheadAttention(8, 2), "in_proj_weight", slice(8, 16)),
    "an expert": lambda: Weight(stack(), "w", 2),
    "an expert (in, out)": lambda: Weight(stack(), "w", 2, transposed=True),
}


def stack():
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(3, 4, 5))
    return module


@pytest.mark.parametrize("kind", LAYERS)
def test_matrix_times_inputs_is_the_layer(kind):
    layer, x = LAYERS[kind]()
    product = inputs_of(layer, x) @ Weight(layer).matrix().t() + layer.bias
    expected = layer(x)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        expected = expected.movedim(-1 - len(layer.kernel_size), -1)
    torch.testing.assert_close(product, expected.reshape(product.shape))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_parts_are_written_as_read_and_nothing_else_changes(kind):
    weight = WEIGHTS[kind]()
    before, wanted = weight.whole.clone(), torch.randn_like(weight.matrix())
    weight.write(wanted)
    assert torch.equal(weight.matrix(), wanted) and wanted.numel() == weight.tensor.numel()
    weight.tensor.copy_(before if weight.part is None else before[weight.part])
    assert torch.equal(weight.whole, before)


def test_a_transposed_convolution_multiplies_rows_of_inputs():
    """With a stride as wide as the taps they do not overlap: each output is one product."""
    layer, x = nn.ConvTranspose2d(4, 6, 2, stride=2), torch.randn(3, 4, 5, 5)
    product = inputs_of(layer, x) @ Weight(layer).matrix().t()  # (places, 6 * 2 * 2)
    tiles = product.reshape(3, 5, 5, 6, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 6, 10, 10)
    torch.testing.assert_close(tiles + layer.bias[:, None, None], layer(x))


def test_a_write_that_does_not_reach_the_weight_is_an_error():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    with pytest.raises((UsageError, RuntimeError)):
        write_matrix(layer, torch.randn(4, 4))
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="computed"):
        write_matrix(computed, torch.zeros(4, 4))


def test_what_recomputes_a_parameter_is_named():
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert "remove_parametrizations(layer, 'weight_hh_l0')" in why_not_plain(lstm, "weight_hh_l0")
    attention = nn.MultiheadAttention(8, 2)
    assert why_not_plain(attention, "in_proj_weight") is None
    prune.identity(attention, "in_proj_weight")
    assert "prune.remove(layer, 'in_proj_weight')" in why_not_plain(attention, "in_proj_weight")


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d"])
def test_write_is_the_inverse_of_read(kind):
    layer, _ = LAYERS[kind]()
    wanted = torch.randn_like(as_matrix(layer))
    write_matrix(layer, wanted)
    assert torch.equal(as_matrix(layer), wanted)
    with pytest.raises(UsageError, match="matrix"):
        write_matrix(layer, wanted[:-1])


def test_what_cannot_be_pruned():
    assert not is_prunable(nn.LayerNorm(4))
    assert not is_prunable(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(UsageError, match="LayerNorm"):
        as_matrix(nn.LayerNorm(4))
    with pytest.raises(UsageError, match="group"):
        inputs_of(nn.Conv1d(4, 4, 1, groups=2), torch.randn(1, 4, 3))
