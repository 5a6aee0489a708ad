"""SnapKV on SmolLM2-135M: the end of the prompt tells which keys to keep."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.caches import TOKENS, WHERE, bits
from gossamer.claims.ledger import Claim, Figures, Promise, promise

NAMES = ("dense", "snapkv", "streamingllm", "random keys")


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per token of SnapKV, of dense, and of two ways to evict without looking."""
    found = bits(seed, short)
    held = found["snapkv, keys held"]
    return {name: found[name] for name in NAMES} | {"keys held for a head": held}


def promises(found: Figures) -> list[Promise]:
    """Near dense, better than blind eviction, and no more keys than asked."""
    snapkv = found["snapkv"]
    return [
        promise("no more keys than asked", "mechanism", [TOKENS + 0.5] * len(snapkv),
                found["keys held for a head"]),
        promise("bits per token near dense", "quality", found["dense"], snapkv, 0.1),
        promise("fewer bits than a window with first keys", "quality", found["streamingllm"],
                snapkv),
        promise("fewer bits than random keys", "quality", found["random keys"], snapkv),
        Promise("3.6 times faster decoding at 16k tokens", "quality",
                reason="no model here reads 16k tokens, and the figure is of a GPU"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.SnapKV,
    "At 16k tokens 3.6 times faster decoding and 8.2 times less memory, with quality comparable to "
    "dense.",
    f"{WHERE} The first 4 and the last 16 keys are fixed, also among random keys; the last 64 "
    "queries; averages over 7.",
    one,
    promises,
    threads=None,
)
