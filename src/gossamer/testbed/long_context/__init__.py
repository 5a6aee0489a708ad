"""Tasks on long prompts after The Sparse Frontier (2025), made at any length for any tokenizer.

Eight of its nine families: three after RULER, three on stories, and two in place of its three
question-answering sets (SQuAD, QuALITY and TOEFL), which are not bundled.
"""

from __future__ import annotations

from typing import Protocol

from gossamer.core.errors import UsageError
from gossamer.testbed.long_context.base import Count, Question, Sample
from gossamer.testbed.long_context.documents import DocumentAnswer, DocumentChoice
from gossamer.testbed.long_context.retrieval import CommonWords, Needles, VariableTracking
from gossamer.testbed.long_context.story import StoryFiltering, StoryMultiHop, StoryRetrieval

__all__ = [
    "FAMILIES",
    "CommonWords",
    "DocumentAnswer",
    "DocumentChoice",
    "Family",
    "Needles",
    "Question",
    "Sample",
    "StoryFiltering",
    "StoryMultiHop",
    "StoryRetrieval",
    "VariableTracking",
    "family",
]


class Family(Protocol):
    """A family of tasks."""

    @property
    def name(self) -> str: ...

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens, the same for the same seed.

        count: the tokens of a text. Raises UsageError for lengths that the task cannot have.
        """
        ...


FAMILIES: tuple[Family, ...] = (
    Needles(), VariableTracking(), CommonWords(), StoryRetrieval(), StoryMultiHop(),
    StoryFiltering(), DocumentAnswer(), DocumentChoice(),
)  # fmt: skip
"""With the study's settings."""


def family(name: str) -> Family:
    """The family of a name, with the study's settings; raises UsageError where there is none."""
    for one in FAMILIES:
        if one.name == name:
            return one
    raise UsageError(f"the families are {', '.join(one.name for one in FAMILIES)}, not {name!r}")
