"""The record by which a method is known to the registry, the docs and the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What a method is, needs, admits and claims.

    needs: statistics it reads, of `norm`, `hessian`, `gradients`. patterns: of `unstructured`,
    `nm`, `block`, `channel`. kind: `score`, `solver`, `trainer`, or `rounds` for an outer loop over
    training. status: `stable` or `experimental`.
    """

    name: str
    kind: str
    title: str
    year: int
    link: str
    needs: tuple[str, ...]
    patterns: tuple[str, ...]
    claim: str
    status: str
    summary: str
    defaults: str
    notes: str
