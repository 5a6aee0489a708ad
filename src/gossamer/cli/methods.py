"""gossamer methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gossamer.cli.output import print_json, print_table, print_text
from gossamer.core.card import Card
from gossamer.methods import cards, find, verdicts

KINDS = {
    "score": "one-shot",
    "solver": "one-shot",
    "trainer": "training",
    "rounds": "rounds",
}


@dataclass
class Methods:
    """List the methods and what became of their claims here, or show one method's card.

    Example: gossamer methods sparsegpt
    """

    PLACES = ("name",)

    name: str = ""
    """show all that is known of this method"""
    json: bool = False
    """print one JSON object with every card and verdict"""

    def run(self) -> None:
        """Print the catalogue or a card."""
        found = verdicts()
        chosen = [find(self.name).card] if self.name else list(cards())
        if self.json:
            both = [dataclasses.asdict(c) | {"verdict": found.get(c.name)} for c in chosen]
            print_json({"methods": both})
        elif self.name:
            _print_card(chosen[0], found.get(chosen[0].name, "not tried"))
        else:
            rows = [
                (
                    card.name,
                    KINDS.get(card.kind, card.kind),
                    _short(found.get(card.name)),
                    card.summary,
                )
                for card in chosen
            ]
            print_table("Methods", ("name", "use", "claim", "what"), rows)
            print_text(
                "use: one-shot prunes a trained model (gossamer compress); training and rounds make "
                "a model sparse while it trains (gossamer train)."
            )
            print_text(
                "claim: what became of the paper's claim on small tasks here. open: the tasks are too "
                "small to tell, which says nothing against the method."
            )
            print_text("gossamer methods NAME shows all that is known of one.")


def _short(verdict: str | None) -> str:
    words = {"not testable at this size": "open", "does not hold here": "no", None: "not tried"}
    return words.get(verdict, verdict or "")


def _print_card(card: Card, verdict: str) -> None:
    rows = [
        ("use", KINDS.get(card.kind, card.kind)),
        ("paper", f"{card.title}, {card.year}, {card.link}"),
        ("needs", ", ".join(card.needs) or "no data"),
        ("patterns", ", ".join(card.patterns)),
        ("defaults", card.defaults),
        ("status", card.status),
        ("claim", card.claim),
        ("claim here", verdict),
        ("notes", card.notes),
    ]
    print_text(f"{card.name}: {card.summary}")
    for name, text in rows:
        print_text(f"{name}: {text}", indent="  ")
