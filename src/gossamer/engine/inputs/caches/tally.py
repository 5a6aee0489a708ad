"""What a sparse cache read and holds, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.core.errors import UsageError
from gossamer.engine.inputs.caches.rows import Read


@dataclass(frozen=True)
class LayerCache:
    """The figures of one layer.

    Attributes
    ----------
    name : str
        Of the attention module, dotted.
    rows : float
        Keys held for a head, on average over texts and heads of keys.
    density : float or None
        Keys read for a token over those of the text so far; None before the first single token.
    resident_bytes : int
        Held, with room to spare and all that belongs to the choice.
    """

    name: str
    rows: float
    density: float | None
    resident_bytes: int


@dataclass(frozen=True, repr=False)
class CacheResult:
    """What a sparse cache did while single tokens were decoded.

    Attributes
    ----------
    method : str
        With its options.
    layers : tuple of LayerCache
        Of each layer of the model.
    seen : int
        Tokens that the model has been given, padding included.
    tokens : int
        Single tokens decoded.
    density : float or None
        Keys read over all keys that dense decoding would have read, over layers and tokens.
    bytes_per_token : float or None
        Bytes that attention read for one token of each text of the batch, the choice included.
    choosing_bytes_per_token : float or None
        Of them, those read to choose.
    dense_bytes_per_token : float or None
        What dense decoding would have read.
    resident_bytes, dense_bytes : int
        Held now; and what the keys and values of all tokens would take.
    """

    method: str
    layers: tuple[LayerCache, ...]
    seen: int
    tokens: int
    density: float | None
    bytes_per_token: float | None
    choosing_bytes_per_token: float | None
    dense_bytes_per_token: float | None
    resident_bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.method}: {self.seen} tokens in {len(self.layers)} layers",
            f"held: {self.resident_bytes / 2**20:.1f} MiB, {self.resident_bytes / max(1, self.dense_bytes):.3f}"
            " of a dense cache",
        ]
        if self.density is not None and self.bytes_per_token is not None:
            dense = self.dense_bytes_per_token or 1.0
            lines.append(f"density {self.density:.3f} of the keys, in {self.tokens} tokens")
            lines.append(
                f"bytes read {self.bytes_per_token / dense:.3f} of dense, the choice "
                f"{(self.choosing_bytes_per_token or 0) / dense:.3f} of it"
            )
        return "\n".join(lines)

    __repr__ = __str__


def tallied(method: Any, names: Sequence[str], layers: Sequence[Any]) -> CacheResult:
    """The figures so far."""
    if not any(layer.seen for layer in layers):
        raise UsageError(
            f"none of {len(layers)} layers gave its keys to the cache; pass it as past_key_values"
        )
    read, possible = Read(), Read()
    parts = []
    for name, layer in zip(names, layers, strict=True):
        read, possible = read + layer.read, possible + layer.possible
        density = layer.read.keys / layer.possible.keys if layer.possible.keys else None
        parts.append(LayerCache(name, layer.rows / max(1, layer.heads), density, layer.nbytes))
    tokens = max(layer.tokens for layer in layers)
    return CacheResult(
        repr(method), tuple(parts), layers[0].seen, tokens,
        read.keys / possible.keys if possible.keys else None,
        (read.bytes + read.choosing) / tokens if tokens else None,
        read.choosing / tokens if tokens else None,
        possible.bytes / tokens if tokens else None,
        sum(layer.nbytes for layer in layers),
        sum(layer.dense_bytes for layer in layers),
    )  # fmt: skip
