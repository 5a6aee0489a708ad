"""The three families after RULER: needles in a haystack, variable tracking, common words."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gossamer.core.errors import UsageError
from gossamer.testbed.long_context.base import Count, Question, Sample, filled
from gossamer.testbed.long_context.words import THINGS, cycled, lines, words

_KEYS = [
    *THINGS,
    "garden",
    "harbour",
    "castle",
    "forest",
    "island",
    "desert",
    "valley",
    "bridge",
    "market",
    "temple",
    "tavern",
    "tower",
    "river",
    "mountain",
    "falcon",
    "beaver",
    "otter",
    "badger",
    "spider",
    "turtle",
    "pigeon",
    "salmon",
    "lizard",
    "donkey",
    "rabbit",
    "parrot",
]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Needles:
    """Numbers hidden in prose; each of four is asked for by its word."""

    needles: int = 4
    queries: int = 4
    name = "needles"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens."""
        if not 1 <= self.queries <= self.needles <= len(_KEYS):
            raise UsageError(
                f"{self.queries} questions need as many needles, and at most {len(_KEYS)}, not "
                f"{self.needles}"
            )
        rng = random.Random(f"{self.name} {seed}")
        keys = rng.sample(_KEYS, self.needles)
        numbers = rng.sample(range(10_000, 100_000), self.needles)
        start, places = rng.randrange(len(lines())), [rng.random() for _ in keys]
        asked = rng.sample(range(self.needles), self.queries)
        hidden = [f"The special magic number for {k} is: {n}." for k, n in zip(keys, numbers)]
        questions = tuple(
            Question(f"\nThe special magic number for {keys[i]} is:", (str(numbers[i]),),
                     "exact match")
            for i in asked
        )  # fmt: skip

        def make(amount: int) -> Sample:
            text = _scattered(cycled(lines(), start, amount), hidden, places)
            wanted = ", ".join(keys[i] for i in asked)
            return Sample(
                "Some special magic numbers are hidden within the following text. Memorize them.\n"
                f"{text}\nWhat are the special magic numbers for {wanted} in the text above?",
                questions,
            )

        return filled(make, length, count)


@dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments in noise; which variables hold a value, directly or through others?"""

    chains: int = 8
    hops: int = 4
    name = "variable tracking"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens."""
        rng = random.Random(f"{self.name} {seed}")
        size = self.hops + 1
        names: set[str] = set()
        while len(names) < size * self.chains:
            names.add("".join(rng.choices(_LETTERS, k=5)))
        drawn = rng.sample(sorted(names), len(names))
        values = rng.sample(range(10_000, 100_000), self.chains)
        statements, places = [], []
        for chain, value in enumerate(values):
            own = drawn[chain * size : (chain + 1) * size]
            sources = [str(value), *(f"VAR {name}" for name in own[:-1])]
            statements += [f"VAR {name} = {one}" for name, one in zip(own, sources, strict=True)]
            places += sorted(rng.random() for _ in own)  # a chain keeps its order
        start, asked = rng.randrange(len(lines())), rng.randrange(self.chains)
        answer = tuple(drawn[asked * size : (asked + 1) * size])
        question = Question(
            f"\nThe {size} variables that are assigned the value {values[asked]} are:",
            answer,
            "IoU",
        )

        def make(amount: int) -> Sample:
            text = _scattered(cycled(lines(), start, amount), statements, places)
            return Sample(
                "Memorize and track the chains of variable assignments in the following text.\n"
                f"{text}\nFind all variables that are assigned the value {values[asked]}, "
                "directly or through other variables.",
                (question,),
            )

        return filled(make, length, count)


@dataclass(frozen=True)
class CommonWords:
    """A list of words, of which some come often; which ones?"""

    common: int = 10
    often: int = 30
    seldom: int = 3
    name = "common words"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of 95% to 100% of `length` tokens."""
        if not 1 <= self.seldom < self.often:
            raise UsageError(f"seldom is from 1 to below often, not {self.seldom} of {self.often}")
        drawn = random.Random(f"{self.name} {seed}").sample(words(), len(words()))
        common, rest = drawn[: self.common], drawn[self.common :]
        question = Question(f"\nThe {self.common} most common words are:", tuple(common), "IoU")

        def make(amount: int) -> Sample:
            listed = common * self.often
            for index, word in enumerate(rest[: -(-amount // self.seldom)]):
                listed += [word] * min(self.seldom, amount - index * self.seldom)
            random.Random(f"{self.name} {seed} {amount}").shuffle(listed)
            text = " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
            return Sample(
                "Below is a numbered list of words. Some appear more often than others. Memorize "
                f"the ones that appear most often.\n{text}\nWhat are the {self.common} most common "
                "words in the list above?",
                (question,),
            )

        return filled(make, length, count, most=self.seldom * len(rest))


def _scattered(filler: list[str], hidden: list[str], places: list[float]) -> str:
    """The filler with each hidden line at its place, from 0 for the beginning to 1 for the end."""
    keyed = [((index + 0.5) / len(filler), line) for index, line in enumerate(filler)]
    keyed += list(zip(places, hidden, strict=True))
    return "\n".join(line for _, line in sorted(keyed, key=lambda one: one[0]))
