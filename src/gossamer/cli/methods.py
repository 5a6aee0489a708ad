"""gossamer methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gossamer.cli.output import print_json, print_table
from gossamer.methods import cards


@dataclass
class Methods:
    """List the methods and what they need.

    Example: gossamer methods --json
    """

    json: bool = False
    """print one JSON object with every card"""

    def run(self) -> None:
        """Print the catalogue."""
        if self.json:
            print_json({"methods": [dataclasses.asdict(card) for card in cards()]})
            return
        rows = [
            (card.name, card.kind, str(card.year), ", ".join(card.needs) or "no data",
             ", ".join(card.patterns), card.summary)
            for card in cards()
        ]  # fmt: skip
        print_table("Methods", ("name", "kind", "year", "needs", "patterns", "what"), rows)
