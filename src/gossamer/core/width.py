"""Units of a transformer block that several layers share, as planners see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Width:
    """The neurons of one feed-forward layer, or the heads of one attention layer by query group.

    Parameters
    ----------
    name : str
        Of the module that holds the layers, such as `model.layers.0.mlp`.
    kind : str
        `neurons` or `heads`; a unit of heads is a key-value head with all queries that use it.
    units : int
        How many there are.
    weights : mapping of str to Tensor
        By layer name the weights of its units, (units, numbers per unit); biases are left out.
    """

    name: str
    kind: str
    units: int
    weights: Mapping[str, Tensor]
