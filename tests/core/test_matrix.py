"""Layers seen as matrices: orientation, round trip, and agreement with the layer's own forward."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.matrix import as_matrix, inputs_of, is_prunable, write_matrix


def conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    return pytorch_utils.Conv1D(6, 10)


LAYERS = {
    "linear": lambda: (nn.Linear(10, 6), torch.randn(3, 5, 10)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), torch.randn(2, 4, 9, 8)),
    "conv1d": lambda: (conv1d(), torch.randn(3, 5, 10)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_matrix_times_inputs_is_the_layer(kind):
    layer, x = LAYERS[kind]()
    product = inputs_of(layer, x) @ as_matrix(layer).t() + layer.bias
    expected = layer(x)
    if kind == "conv2d":
        expected = expected.permute(0, 2, 3, 1)
    torch.testing.assert_close(product, expected.reshape(product.shape))


@pytest.mark.parametrize("kind", LAYERS)
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
