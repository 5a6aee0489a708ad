"""Channels that residual sums and depthwise layers tie together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coupled:
    """Layers whose output channels 0..width-1 can only be removed together, by module name.

    Attributes
    ----------
    width : int
        How many channels.
    layers : tuple of str
        Linear and ungrouped Conv2d that write the channels.
    norms : tuple of str
        Batch norms over them.
    depthwise : tuple of str
        Depthwise convolutions over them.
    readers : tuple of str
        Linear and Conv2d that read them.
    """

    width: int
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    depthwise: tuple[str, ...]
    readers: tuple[str, ...]
