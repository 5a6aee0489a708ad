"""Ordinary layers again in the places of packed ones and of those that train sparsely."""

from __future__ import annotations

from torch import nn

from gossamer.nn.chain import unfuse
from gossamer.nn.packed.places import take_all_back
from gossamer.nn.sparse import SparseLayer


def to_dense(model: nn.Module) -> nn.Module:
    """Replace every layer inside `model` that is packed or trains sparsely by its dense form, in
    place; the model, or where it is such a layer itself its dense form."""
    if isinstance(model, SparseLayer):
        return model.to_dense()
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLayer):
            model.set_submodule(name, module.to_dense())
    root = take_all_back(model)
    unfuse(root)
    return root
