"""The way back from packed layers to ordinary ones."""

from __future__ import annotations

import warnings

from torch import nn

from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.nn import QuantizedLinear, to_dense


def unpack(model: nn.Module | PruneResult | CompressResult) -> nn.Module:
    """Undo `compress` in place: packed layers become ordinary ones with zeros; returns the model.

    Fine-tuning, peft, ONNX, tracing and every other reader of plain layers then work. Hooks,
    attributes and biases go back to layers of the classes that were replaced. Layers that train
    sparsely (`sparse_layers`) become dense ones too. Layers that hold integers give the weights as
    they were rounded, and a warning says how many. It takes the memory of the dense weights.

    Parameters
    ----------
    model : nn.Module, PruneResult or CompressResult
        Changed in place.

    Examples
    --------
    >>> import gossamer as gs, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU())
    >>> fast = gs.compress(gs.prune(net, gs.weights.Magnitude(), density=0.2), latency="rule")
    >>> _ = gs.unpack(fast)
    >>> net[0]
    Linear(in_features=128, out_features=64, bias=True)
    """
    root = unwrap(model)
    rounded = sum(isinstance(module, QuantizedLinear) for module in root.modules())
    if rounded:
        warnings.warn(
            f"{rounded} layers held integers: their weights stay rounded, only no longer packed",
            stacklevel=2,
        )
    return to_dense(root)
