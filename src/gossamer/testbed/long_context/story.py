"""Three families on a story of chapters: retrieval, multi-hop and filtering."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from gossamer.testbed.long_context.base import Count, Question, Sample, filled
from gossamer.testbed.long_context.words import THINGS

_PLACES = [
    "Arlen",
    "Bodmin",
    "Calder",
    "Dunmore",
    "Eastry",
    "Falkirk",
    "Garrow",
    "Helmsley",
    "Ilkley",
    "Jarrow",
    "Kelso",
    "Langport",
    "Malvern",
    "Norwell",
    "Oakham",
    "Penrith",
    "Quarley",
    "Romsey",
    "Selkirk",
    "Thirsk",
    "Ulverton",
    "Ventnor",
    "Whitby",
    "Yarrow",
]
_PEOPLE = [
    "Agnes",
    "Bruno",
    "Clara",
    "Dorian",
    "Edith",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karla",
    "Leopold",
    "Magda",
    "Nestor",
    "Olga",
    "Pascal",
    "Rosa",
    "Simon",
    "Thea",
    "Ulrich",
    "Vera",
    "Walter",
    "Xenia",
    "Yves",
]
_COLOURS = ["red", "green", "blue", "black", "white", "brown", "yellow", "grey"]
_KINDS = ["small", "large", "worn", "new", "plain", "heavy", "broken", "costly"]
_ITEMS = [f"{kind} {colour} {thing}" for kind in _KINDS for colour in _COLOURS for thing in THINGS]
_WEATHER = (
    "It had rained since the morning", "A cold wind came from the hills", "The sun was low",
    "Fog lay over the fields", "Snow had begun to fall", "The night was warm and still",
)  # fmt: skip
_MEALS = ("bread and cheese", "a thick soup", "roasted fish", "cold pies", "apples and nuts")


@dataclass(frozen=True)
class Chapter:
    """What happened: where, whom Ada met, and what she bought, if anything."""

    number: int
    place: str
    person: str
    item: str
    text: str


def chapters(count: int, without: int, rng: random.Random) -> list[Chapter]:
    """So many chapters, `without` of them without a purchase, never the first two."""
    bare = set(rng.sample(range(2, count), without))
    bought = iter(rng.sample(_ITEMS, count))
    found = []
    for index in range(count):
        place, person = rng.choice(_PLACES), rng.choice(_PEOPLE)
        item = "" if index in bare else next(bought)
        deal = f"In the market she bought a {item}" if item else "She bought nothing that day"
        text = (
            f"Chapter {index + 1}. Ada came to {place}. {rng.choice(_WEATHER)}. There she met "
            f"{person}, and they ate {rng.choice(_MEALS)}. {deal}, and then she went on."
        )
        found.append(Chapter(index + 1, place, person, item, text))
    return found


Asker = Callable[[list[Chapter], random.Random], tuple[Question, ...]]


def _told(name: str, length: int, seed: int, count: Count, least: int, ask: Asker) -> Sample:
    """A story of as many chapters as fit; three of them have no purchase."""

    def make(amount: int) -> Sample:
        rng = random.Random(f"{name} {seed}")
        story = chapters(amount, 3, rng)
        text = "\n".join(chapter.text for chapter in story)
        return Sample(f"Read the story of Ada and answer.\n{text}\n", ask(story, rng))

    return filled(make, length, count, least, len(_ITEMS))


@dataclass(frozen=True)
class StoryRetrieval:
    """Sixteen questions of where Ada was, whom she met and what she bought in some chapter."""

    questions: int = 16
    name = "story retrieval"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of at most `length` tokens."""

        def ask(story: list[Chapter], rng: random.Random) -> tuple[Question, ...]:
            told = [
                (f"\nIn chapter {c.number} Ada {what}", answer)
                for c in story
                for what, answer in (
                    ("came to", c.place), ("met", c.person), ("bought a", c.item)
                )
                if answer
            ]  # fmt: skip
            chosen = rng.sample(told, self.questions)
            return tuple(Question(lead, (answer,), "exact match") for lead, answer in chosen)

        return _told(self.name, length, seed, count, max(5, -(-self.questions // 2)), ask)


@dataclass(frozen=True)
class StoryMultiHop:
    """Which item did Ada buy just before another one? Chapters without a purchase lie between."""

    name = "story multi-hop"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of at most `length` tokens."""

        def ask(story: list[Chapter], rng: random.Random) -> tuple[Question, ...]:
            bought = [chapter.item for chapter in story if chapter.item]
            place = rng.randrange(1, len(bought))
            lead = f"\nThe last thing that Ada bought before the {bought[place]} was a"
            return (Question(lead, (bought[place - 1],), "exact match"),)

        return _told(self.name, length, seed, count, 5, ask)


@dataclass(frozen=True)
class StoryFiltering:
    """In which three chapters did Ada buy nothing?"""

    name = "story filtering"

    def sample(self, length: int, seed: int, count: Count) -> Sample:
        """One prompt of at most `length` tokens."""

        def ask(story: list[Chapter], rng: random.Random) -> tuple[Question, ...]:
            bare = tuple(str(chapter.number) for chapter in story if not chapter.item)
            return (Question("\nThe 3 chapters in which Ada bought nothing are:", bare, "IoU"),)

        return _told(self.name, length, seed, count, 5, ask)
