"""Layers of every kind, with an empty module to load them into."""

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.matrix import as_matrix
from gossamer.nn import NMLinear, QuantizedLinear


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_llama):
    """A folder with a small packed model; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_llama(positions=64)
    gs.prune(model, gs.weights.Magnitude(), density=0.4)
    gs.save(gs.compress(model), folder)
    return folder


@pytest.fixture(scope="session")
def as_nm():
    def as_nm(pruned, pattern):
        """In this form whatever its size: layers this small would be smaller with a bitmap."""
        for record in pruned.layers:
            module = pruned.model.get_submodule(record.name)
            layer = NMLinear.from_matrix(as_matrix(module), module.bias, pattern)
            pruned.model.set_submodule(record.name, layer)
        return pruned.model

    return as_nm


@pytest.fixture(scope="session")
def nm_parts(as_nm):
    def nm_parts():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(200, 33))
        pruned = gs.prune(net, gs.weights.Magnitude(), pattern=gs.NM(2, 8))
        return as_nm(pruned, "2:8"), nn.Sequential(nn.Linear(200, 33))

    return nm_parts


@pytest.fixture(scope="session")
def quantised_parts():
    def quantised_parts(symmetric, outliers, dense, bits):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(150, 33))
        weight = net[0].weight.detach()
        if not dense:
            weight = weight * (torch.rand_like(weight) < 0.4)
        layer = QuantizedLinear.from_matrix(
            weight, net[0].bias, bits=bits, group=64, symmetric=symmetric, outliers=outliers
        )
        return nn.Sequential(layer), net

    return quantised_parts
