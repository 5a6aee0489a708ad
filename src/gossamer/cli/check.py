"""gossamer check."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.claims import run
from gossamer.claims.ledger import summary
from gossamer.cli.output import print_json, print_text


@dataclass
class Check:
    """Try what a method's paper claims on a small task, and print the verdict.

    Example: gossamer check rigl --short
    """

    PLACES = ("name",)

    name: str
    """the method, such as rigl; `gossamer methods` lists them"""
    short: bool = False
    """two seeds of a smaller form, which shows that the check works and decides little"""
    json: bool = False
    """print the record as one JSON object"""

    def run(self) -> None:
        """Run the claim, seed by seed, and print what came out."""
        found = run(self.name, self.short, progress=True)
        if self.json:
            print_json(found)
            return
        first, *lines = summary(found)
        print_text(first)
        for line in lines:
            print_text(line, indent="  ")
