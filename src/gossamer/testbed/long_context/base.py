"""Samples of long-context tasks: a prompt that fills a length, questions behind it, and scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gossamer.core.errors import UsageError

Score = Literal["exact match", "IoU", "F1"]
Count = Callable[[str], int]
"""How many tokens a text has, for some tokenizer."""
LEAST = 0.95
"""The share of a length that a prompt fills at least."""


@dataclass(frozen=True)
class Question:
    """What the model goes on from, what it should write, and how that is scored.

    lead: text that the answer continues. answers: one, or for IoU the whole set.
    """

    lead: str
    answers: tuple[str, ...]
    score: Score

    def marked(self, written: str) -> float:
        """The score of what a model wrote, from 0 to 1. Only the first line of it counts."""
        line = written.strip().split("\n", 1)[0]
        if self.score == "exact match":
            return exact_match(line, self.answers[0])
        if self.score == "IoU":
            return intersection_over_union(line, self.answers)
        return f1(line, self.answers[0])


@dataclass(frozen=True)
class Sample:
    """A text with its questions. The prompt ends with the lead of the first question; each further
    lead follows what was written."""

    text: str
    questions: tuple[Question, ...]

    @property
    def prompt(self) -> str:
        """What is read at once."""
        return self.text + self.questions[0].lead


def filled(
    make: Callable[[int], Sample], length: int, count: Count, least: int = 0, most: int = 1 << 20
) -> Sample:
    """The sample with the most filler whose prompt has at most `length` tokens.

    make: a sample by its amount of filler, from `least` to `most`; more filler means more tokens.
    Raises UsageError where the smallest is too long, or where more than a twentieth of the length
    stays empty.
    """
    if (smallest := count(make(least).prompt)) > length:
        raise UsageError(
            f"the task takes {smallest} tokens without any filler: ask for a longer prompt than "
            f"{length}"
        )
    low, high = least, max(1, 2 * least)
    while high < most and count(make(high).prompt) <= length:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle).prompt) <= length else (low, middle)
    sample = make(low)
    if (found := count(sample.prompt)) < LEAST * length:
        reason = "it has no more filler" if low == most else "a unit of its filler is longer"
        raise UsageError(f"the prompt has {found} tokens of {length}, and {reason}")
    return sample


def exact_match(written: str, answer: str) -> float:
    """1 where the text begins with the answer as a whole word, whatever its case."""
    found = re.match(re.escape(answer.lower()) + r"(?!\w)", written.strip(" \"'*`").lower())
    return float(found is not None)


def intersection_over_union(written: str, answers: Iterable[str]) -> float:
    """Of the items in the text, which commas, `and` or spaces separate, and the answers.

    Numbers of a numbered list are no items.
    """
    cleaned = re.sub(r"\band\b|(?:^|(?<=\s))\d+\.(?=\s)", " ", written.lower())
    found = set(re.findall(r"[\w-]+", cleaned))
    wanted = {answer.lower() for answer in answers}
    return len(found & wanted) / len(found | wanted) if found | wanted else 1.0


def f1(written: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words, as SQuAD counts them."""
    found, wanted = (re.findall(r"\w+", text.lower()) for text in (written, answer))
    common = sum(min(found.count(word), wanted.count(word)) for word in set(wanted))
    return 2 * common / (len(found) + len(wanted)) if common else 0.0
