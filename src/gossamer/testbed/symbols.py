"""A language of symbols with three tasks on long prompts: needles, multi-hop chains and counting.

A prompt is noise, in which statements and counted words lie scattered, and questions at its end. A
statement `SET name value` binds a name to a value, and `SET name other` binds it to what the other
name stands for. `ASK name` is answered by the value at the end of the chain, `TALLY word` by how
often the word occurred. Answers are one symbol each and stand behind their question, so one reading
of a prompt shows how many are right.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError

BOS, SET, ASK, TALLY = range(4)
NUMBERS = range(4, 13)
"""The symbol of n is NUMBERS[n], n from 0 to 8."""
COUNTS = (1, 2, 4, 8)
"""How often a counted word occurs, in tasks and in training."""
VALUES = range(16, 40)
NAMES = range(40, 88)
WORDS = range(88, 104)
NOISE = range(104, 128)
SYMBOLS = 128
IGNORED = -100
"""Stands where nothing is asked, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Content:
    """What a prompt holds: chains by their number of hops, words with their counts, questions.

    hops: one chain each, of so many links behind its first statement; 0 is a needle. counts: one
    word each. asked: questions about ends of chains, and about words, drawn from those there are.
    """

    hops: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    asked: int = 4

    def __post_init__(self) -> None:
        if sum(self.hops) + len(self.hops) > len(NAMES) or len(self.counts) > len(WORDS):
            raise UsageError(
                f"a prompt has at most {len(NAMES)} names and {len(WORDS)} words: give fewer "
                "chains, hops or counts"
            )
        if not 1 <= self.asked <= len(self.hops) + len(self.counts):
            raise UsageError(f"{self.asked} questions need as many chains and words")
        if any(not 1 <= count < len(NUMBERS) for count in self.counts):
            raise UsageError(f"a word occurs 1 to {len(NUMBERS) - 1} times, not {self.counts}")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes
    ----------
    ids : tuple of int
        Symbols.
    answers : tuple of int
        At each place the symbol that has to follow, where a question ends; IGNORED elsewhere.
    known : tuple of int
        The same, and at the end of each statement the value that its name stands for. That is what
        training may also ask: it is in no symbol, so it gives no answer away.
    """

    ids: tuple[int, ...]
    answers: tuple[int, ...]
    known: tuple[int, ...]


def prompt(length: int, content: Content, rng: random.Random) -> Prompt:
    """A prompt of exactly `length` symbols.

    Raises UsageError where the content does not fit.
    """
    chains, resolved = _chains(content.hops, rng)
    words = dict(zip(rng.sample(WORDS, len(content.counts)), content.counts, strict=True))
    questions = [(ASK, chain[-1][1], resolved[chain[-1][1]]) for chain in chains]
    questions += [(TALLY, word, NUMBERS[count]) for word, count in words.items()]
    questions = rng.sample(questions, content.asked)
    pieces = _body(length - 1 - 3 * len(questions), chains, words, rng)
    ids, answers, known = [BOS], [IGNORED], [IGNORED]
    for piece in pieces:
        ids += piece
        answers += [IGNORED] * len(piece)
        known += [IGNORED] * len(piece)
        if piece[0] == SET:
            known[-1] = resolved[piece[1]]
    for kind, asked, answer in questions:
        ids += [kind, asked, answer]
        answers += [IGNORED, answer, IGNORED]
        known += [IGNORED, answer, IGNORED]
    return Prompt(tuple(ids), tuple(answers), tuple(known))


def _chains(
    hops: Sequence[int], rng: random.Random
) -> tuple[list[list[tuple[int, int, int]]], dict[int, int]]:
    """Statements of each chain in order, and the value of every name."""
    names = iter(rng.sample(NAMES, sum(hops) + len(hops)))
    chains, resolved = [], {}
    for count in hops:
        first, value = next(names), rng.choice(VALUES)
        chain = [(SET, first, value)]
        resolved[first] = value
        for _ in range(count):
            name = next(names)
            chain.append((SET, name, chain[-1][1]))
            resolved[name] = value
        chains.append(chain)
    return chains, resolved


def _body(
    size: int,
    chains: Iterable[Sequence[tuple[int, int, int]]],
    words: dict[int, int],
    rng: random.Random,
) -> list[tuple[int, ...]]:
    """Statements and words at random places in noise; a chain keeps its order."""
    orders = [iter(chain) for chain in chains]
    owners = [index for index, chain in enumerate(chains) for _ in chain]
    singles = [(word,) for word, count in words.items() for _ in range(count)]
    noise = size - 3 * len(owners) - len(singles)
    if noise < 0:
        raise UsageError(f"the content needs {-noise} symbols more than the prompt has")
    singles += [(rng.choice(NOISE),) for _ in range(noise)]
    slots: list[int | tuple[int, ...]] = [*owners, *singles]
    rng.shuffle(slots)
    return [next(orders[slot]) if isinstance(slot, int) else slot for slot in slots]


@dataclass(frozen=True)
class SymbolTask:
    """Questions of one kind, for models of the language of symbols; the score is exact match.

    name: `needle` (8 needles), `multi-hop` (4 chains of 2 hops) or `counting` (10 words, each 1, 2,
    4 or 8 times); four of them are asked. length: symbols of a prompt. prompts: read for each seed.
    """

    name: str
    length: int = 512
    prompts: int = 8
    metric: str = "exact match"
    better: str = "higher"

    def __post_init__(self) -> None:
        if self.name not in ("needle", "multi-hop", "counting"):
            raise UsageError(f"the tasks are needle, multi-hop and counting, not {self.name!r}")

    def made(self, seed: int) -> list[Prompt]:
        """The prompts of a seed."""
        rng = random.Random(f"{self.name} {self.length} {seed}")
        return [prompt(self.length, self._content(rng), rng) for _ in range(self.prompts)]

    def _content(self, rng: random.Random) -> Content:
        if self.name == "needle":
            return Content(hops=(0,) * 8)
        if self.name == "multi-hop":
            return Content(hops=(2,) * 4)
        return Content(counts=tuple(rng.choice(COUNTS) for _ in range(10)))

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Ids and answers, int64 (prompts, length)."""
        made = self.made(seed)
        return torch.tensor([x.ids for x in made]), torch.tensor([x.answers for x in made])

    def score(self, reader: Any, seed: int) -> float:
        """Share of right answers; all of them are read with the prompt, none is written."""
        ids, answers = self.batch(seed)
        good = count = 0
        for one, asked in zip(ids.split(1), answers.split(1), strict=True):
            found = right(reader.read(one, every=True), asked)
            good, count = good + found[0], count + found[1]
        return good / count


def right(logits: Tensor, answers: Tensor) -> tuple[int, int]:
    """How many answers a model's most likely symbols give, and how many there are."""
    asked = answers != IGNORED
    return int((logits.argmax(-1)[asked] == answers[asked]).sum()), int(asked.sum())


@torch.no_grad()
def accuracy(model: nn.Module, task: SymbolTask, seed: int) -> float:
    """Share of right answers on a seed's prompts."""
    ids, answers = task.batch(seed)
    good, count = right(model(input_ids=ids, use_cache=False).logits, answers)
    return good / count
