"""Claims of the papers, tried on small tasks: one file per method, in a folder per topic.

They lie in the package, because `gossamer check` runs them where no repository is. Nothing but the
command line imports them. From a shell: python -m gossamer.claims rigl [--short] [--out FOLDER]
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gossamer.claims.ledger import Claim, check
from gossamer.core.errors import UsageError
from gossamer.engine.progress import track
from gossamer.methods import find


def run(name: str, short: bool = False, progress: bool = False) -> dict[str, Any]:
    """Try the claim of a method and return its record.

    Parameters
    ----------
    name : str
        The method's name, as on its card, such as `rigl` or `weights.random`.
    short : bool, default False
        Run two seeds of a smaller form. It shows that the check works; its verdict says little.
    progress : bool, default False
        Show on stderr which seed is running.

    Returns
    -------
    dict
        The record: figures of every seed, one line per promise, and the verdict.

    Raises
    ------
    UsageError
        For a name that is no method's, or a method without a claim.
    """
    claim = load(name)
    with _threads(claim.threads), track(None, progress, f"claim of {name}") as step:
        return check(claim, short, step)


def load(name: str) -> Claim:
    """The claim of a method; raises UsageError where there is none."""
    card = find(name).card
    path = f"gossamer.claims.{card.topic}.{card.name}"
    if find_spec(path.rpartition(".")[0]) is None or find_spec(path) is None:
        raise UsageError(f"no claim of {name!r} is written: it belongs in {path}")
    claim: Claim = importlib.import_module(path).CLAIM
    return claim


def write(found: Mapping[str, Any], folder: Path) -> Path:
    """Write a record to TOPIC/NAME.json in the folder of records; return its path."""
    path = folder / str(found["topic"]) / f"{found['method']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch: figures of small networks vary in the last digits with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
