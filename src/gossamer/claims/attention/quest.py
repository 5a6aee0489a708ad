"""Quest on SmolLM2-135M: pages by their bound, against pages that nothing was asked about."""

from __future__ import annotations

import gossamer as gs
from gossamer.claims.caches import PAGE, TOKENS, WHERE, bits
from gossamer.claims.ledger import Claim, Figures, Promise, promise

NAMES = ("dense", "quest", "streamingllm")


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per token, and the keys read for a token."""
    found = bits(seed, short)
    read = found["quest, keys read"]
    return {name: found[name] for name in NAMES} | {"keys read for a head": read}


def promises(found: Figures) -> list[Promise]:
    """Near dense, better than the newest keys, and no more keys than asked."""
    quest = found["quest"]
    return [
        promise("no more keys than asked", "mechanism", [TOKENS + 0.5] * len(quest),
                found["keys read for a head"]),
        promise("bits per token near dense", "quality", found["dense"], quest, 0.1),
        promise("fewer bits than a window with first keys", "quality", found["streamingllm"],
                quest),
        Promise("7 times faster attention in decoding", "quality",
                reason="the figure is of a GPU at 32k tokens, and no model here reads so many"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.Quest,
    "Up to 7 times faster attention in decoding, with negligible loss on long contexts.",
    f"{WHERE} Pages of {PAGE}.",
    one,
    promises,
    threads=None,
)
