"""Ada-SnapKV on SmolLM2-135M: one budget for all heads of a layer against equal budgets."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.caches import TOKENS, WHERE, bits
from gossamer.claims.ledger import Claim, Figures, Promise, promise

NAMES = ("dense", "adasnapkv", "snapkv")


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per token with equal and with adaptive budgets, and the keys held on average."""
    found = bits(seed, short)
    held = found["adasnapkv, keys held"]
    return {name: found[name] for name in NAMES} | {"keys held for a head": held}


def promises(found: Figures) -> list[Promise]:
    """Better than equal budgets at the same memory, and near dense."""
    ours = found["adasnapkv"]
    return [
        promise("no more keys than asked, on average over heads", "mechanism",
                [TOKENS + 0.5] * len(ours), found["keys held for a head"]),
        promise("fewer bits than SnapKV at the same memory", "quality", found["snapkv"], ours),
        promise("bits per token near dense", "quality", found["dense"], ours, 0.1),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.AdaSnapKV,
    "At the same memory, better quality than equal budgets for all heads.",
    f"{WHERE} The first 4 and the last 16 keys are fixed; the last 64 queries; averages over 7; a "
    "floor of a fifth.",
    one,
    promises,
    threads=None,
)
