"""Long-context tasks for a language model: what it is given to read, and the score of what it writes.

A task is handed a reader, which holds the model and decides how prompts are attended. What follows
a prompt is read and written densely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.text import encode
from gossamer.testbed.bundled import heldout_text
from gossamer.testbed.long_context.base import Count, Question, Sample


class Reader(Protocol):
    """A model that reads a prompt once, and then goes on from it."""

    def read(self, ids: Tensor, every: bool = False) -> Tensor:
        """Logits of the last place, or of every one, behind a new prompt (batch, tokens)."""
        ...

    def go_on(self, ids: Tensor) -> Tensor:
        """Logits of the last place behind further tokens (batch, tokens), attended densely."""
        ...


class Family(Protocol):
    """A family of tasks."""

    @property
    def name(self) -> str: ...

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens, the same for the same seed.

        count: the tokens of a text. Raises UsageError for lengths that the task cannot have.
        """
        ...


@dataclass(frozen=True)
class TextTask:
    """Samples of one family for a tokenizer of transformers; the score is the mean over questions."""

    family: Family
    length: int
    tokenizer: Any = field(repr=False, compare=False)
    metric: str = "score of the family's questions"
    better: str = "higher"

    @property
    def name(self) -> str:
        """That of the family."""
        return self.family.name

    def score(self, reader: Reader, seed: int) -> float:
        """Of the sample of a seed."""
        sample = self.family.sample(self.length, seed, lambda text: len(self._ids(text)))
        logits = reader.read(torch.tensor([self._ids(sample.prompt)]))
        marks = []
        for index, question in enumerate(sample.questions):
            if index:
                logits = reader.go_on(torch.tensor([self._ids(question.lead)]))
            marks.append(question.marked(self._written(reader, logits, question)))
        return sum(marks) / len(marks)

    def _written(self, reader: Reader, logits: Tensor, question: Question) -> str:
        """The greedy answer, up to the end of its line."""
        most = len(self._ids(" " + ", ".join(question.answers))) + 3
        most += most // 2 * (question.score == "IoU")
        written: list[int] = []
        while len(written) < most:
            written.append(int(logits[0, -1].argmax()))
            if "\n" in self.tokenizer.decode(written).lstrip():
                break
            logits = reader.go_on(torch.tensor([written[-1:]]))
        return str(self.tokenizer.decode(written))

    def _ids(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)


@dataclass(frozen=True)
class HeldOutText:
    """Bits per byte of windows of the bundled held-out text; the seed chooses the window."""

    length: int
    tokenizer: Any = field(repr=False, compare=False)
    name: str = "held-out text"
    metric: str = "bits per byte"
    better: str = "lower"

    def score(self, reader: Reader, seed: int) -> float:
        """Of one window, whose every token is predicted from those before it."""
        ids = torch.tensor(encode(self.tokenizer, heldout_text().decode("utf-8", "replace")))
        windows = ids.numel() // self.length
        if not windows:
            raise UsageError(f"the held-out text has {ids.numel()} tokens, below {self.length}")
        window = ids.split(self.length)[seed % windows]
        logits = reader.read(window.unsqueeze(0), every=True)[0, :-1]
        nats = sum(
            float(nn.functional.cross_entropy(part.float(), target, reduction="sum"))
            for part, target in zip(logits.split(512), window[1:].split(512), strict=True)
        )
        return nats / math.log(2) / len(self.tokenizer.decode(window[1:]).encode())
