"""Tasks on long prompts after The Sparse Frontier (2025), made at any length for any tokenizer.

Eight of its nine families: three after RULER, three on stories, and two in place of its three
question-answering sets (SQuAD, QuALITY and TOEFL), which are not bundled.
"""

from __future__ import annotations

from gossamer.core.errors import UsageError
from gossamer.testbed.long_context.base import Question, Sample
from gossamer.testbed.long_context.documents import DocumentAnswer, DocumentChoice
from gossamer.testbed.long_context.retrieval import CommonWords, Needles, VariableTracking
from gossamer.testbed.long_context.story import StoryFiltering, StoryMultiHop, StoryRetrieval
from gossamer.testbed.long_context.tasks import Family, HeldOutText, Reader, TextTask

__all__ = [
    "FAMILIES",
    "CommonWords",
    "DocumentAnswer",
    "DocumentChoice",
    "Family",
    "HeldOutText",
    "Needles",
    "Question",
    "Reader",
    "Sample",
    "StoryFiltering",
    "StoryMultiHop",
    "StoryRetrieval",
    "TextTask",
    "VariableTracking",
    "family",
]

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
