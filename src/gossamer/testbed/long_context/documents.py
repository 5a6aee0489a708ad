"""Two families of questions about documents, made of the bundled documentation of Python.

The Sparse Frontier asks questions of SQuAD, QuALITY and TOEFL, which are not bundled. These stand
in for two of them: an answer found in a passage, and a choice among four. Where the documented
names do not fill a prompt, lines of prose come before them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from gossamer.testbed.long_context.base import Count, Question, Sample, filled
from gossamer.testbed.long_context.words import cycled, documented, lines


@dataclass(frozen=True)
class DocumentAnswer:
    """Which name is documented by a sentence? F1 over words, as in SQuAD."""

    name = "document answer"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens."""
        return filled(lambda amount: _made(self.name, seed, amount, 0), length, count, 1)


@dataclass(frozen=True)
class DocumentChoice:
    """The same with four names to choose from; the answer is a letter."""

    name = "document choice"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens."""
        return filled(lambda amount: _made(self.name, seed, amount, 4), length, count, 4)


def _made(family: str, seed: int, amount: int, choices: int) -> Sample:
    rng = random.Random(f"{family} {seed}")
    entries = rng.sample(documented(), len(documented()))
    asked, others = entries[0], entries[1:choices]
    names = rng.sample([asked[0], *(name for name, _ in others)], max(1, choices))
    place = rng.random()
    listed = entries[1:amount]
    listed.insert(int(place * (len(listed) + 1)), asked)
    told = cycled(lines(), rng.randrange(len(lines())), max(0, amount - len(entries)))
    text = "\n".join([*told, *(f"{name}: {sentence}" for name, sentence in listed)])
    question = f'Which of the names above is described as "{asked[1]}"'
    if not choices:
        return Sample(f"{text}\n{question}?", (Question("\nAnswer:", (asked[0],), "F1"),))
    letters = "ABCD"[:choices]
    options = "\n".join(f"{letter}. {name}" for letter, name in zip(letters, names, strict=True))
    answer = letters[names.index(asked[0])]
    return Sample(
        f"{text}\n{question}?\n{options}", (Question("\nAnswer:", (answer,), "exact match"),)
    )
