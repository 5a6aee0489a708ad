"""Words, sentences and documented names out of the bundled text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from gossamer.testbed.bundled import calibration_text, heldout_text

THINGS = (
    "lantern", "compass", "violin", "kettle", "saddle", "telescope", "blanket", "hammer",
    "mirror", "basket", "candle", "anchor", "flute", "ladder", "barrel", "ribbon", "needle",
    "goblet", "pillow", "shovel", "whistle", "saucer", "bucket", "lute",
)  # fmt: skip
"""Names of things that tasks hide and tell of."""


@cache
def lines() -> tuple[str, ...]:
    """Lines of prose of the held-out text, in order."""
    found = (line.strip() for line in heldout_text().decode("utf-8", "replace").splitlines())
    return tuple(line for line in found if re.fullmatch(r"[A-Za-z][\w ,.'()-]{40,}", line))


@cache
def words() -> tuple[str, ...]:
    """Different words of 4 to 9 small letters, in order of the alphabet."""
    found = re.findall(r"\b[a-z]{4,9}\b", heldout_text().decode("utf-8", "replace"))
    return tuple(sorted(set(found)))


@cache
def documented() -> tuple[tuple[str, str], ...]:
    """Names of Python's library, each with the first sentence of its documentation."""
    pattern = re.compile(
        r"^ *\.\. (?:function|method|class|exception|data|attribute):: +([\w.]+)[^\n]*\n"
        r"(?: +[^\n]+\n)*\n+((?: +[^\n]+\n)+)", re.M
    )  # fmt: skip
    found: dict[str, str] = {}
    for text in (heldout_text(), calibration_text()):
        for name, paragraph in pattern.findall(text.decode("utf-8", "replace")):
            sentence = plain(paragraph)
            if 25 <= len(sentence) <= 160 and name.lower() not in sentence.lower():
                found.setdefault(name, sentence)
    times = Counter(found.values())
    return tuple((name, text) for name, text in found.items() if times[text] == 1)


def plain(paragraph: str) -> str:
    """The first sentence without marks of reStructuredText."""
    text = re.sub(r":[\w:]+:`[~!]?([^`]+)`", r"\1", " ".join(paragraph.split()))
    text = re.sub(r"[`*]+", "", text)
    return re.split(r"(?<=[.!?]) ", text)[0]


def cycled(items: Sequence[str], start: int, count: int) -> list[str]:
    """`count` items from a place on; after the last comes the first."""
    return [items[(start + index) % len(items)] for index in range(count)]
