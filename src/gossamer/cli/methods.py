"""gossamer methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gossamer.cli.output import print_json, print_table
from gossamer.methods import cards, verdicts


@dataclass
class Methods:
    """List the methods, what they need, and what became of their claims here.

    Example: gossamer methods --json
    """

    json: bool = False
    """print one JSON object with every card and verdict"""

    def run(self) -> None:
        """Print the catalogue."""
        found = verdicts()
        if self.json:
            both = [dataclasses.asdict(c) | {"verdict": found.get(c.name)} for c in cards()]
            print_json({"methods": both})
            return
        rows = [
            (card.name, card.kind, str(card.year), ", ".join(card.needs) or "no data",
             ", ".join(card.patterns), found.get(card.name, "not tried"), card.summary)
            for card in cards()
        ]  # fmt: skip
        print_table("Methods", ("name", "kind", "year", "needs", "patterns", "claim", "what"), rows)
