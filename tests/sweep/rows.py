"""What happened to one family, step by step, as plain data."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


class Wrong(AssertionError):
    """A number that is not what it should be; the message says which."""


@dataclass
class Row:
    """Outcomes and seconds by step, and facts for the table.

    An outcome is `ok`, `skipped: why`, `refused: the error` (Gossamer's own, raised before anything
    changed), `WRONG: what` (a number) or `CRASH: what` (any other exception).
    """

    name: str
    kind: str
    steps: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)

    def passed(self, step: str) -> bool:
        """Whether a step was done and ended well."""
        return self.steps.get(step) == "ok"

    def faults(self) -> dict[str, str]:
        """The steps that crashed or gave wrong numbers."""
        return {k: v for k, v in self.steps.items() if v.startswith(("CRASH", "WRONG"))}

    def whole(self) -> bool:
        """Whether the family goes the whole path.

        Every method prunes at 50%; some layer is packed; what is packed, saved, loaded, exported and read by others gives
        the numbers of the masked dense model; where transformers generates, the tokens are the
        same. Refusals count against it, but for 2:4 (widths that four does not divide) and for
        `gs.generate`, which serves decoders of text.
        """
        outcomes = {k: v for k, v in self.steps.items() if not ("2:4" in k or "gs.gen" in k)}
        ways = {step.partition(" ")[0] for step in outcomes}
        needed = {"build", "prune", "coverage", "compress", "save", "load", "export", "plain"}
        all_ok = all(outcome == "ok" for outcome in outcomes.values())
        packed = any(not told.startswith("0 ") for told in self.facts.get("packed", {}).values())
        return not self.faults() and needed <= ways and all_ok and packed

    @contextmanager
    def step(self, name: str, untouched: Callable[[str], None] | None = None) -> Iterator[None]:
        """Time a step and turn whatever it raises into its outcome; a bad one stays.

        untouched: given the error, raises Wrong where the refusal was too late or says too little.
        """
        start = time.perf_counter()
        try:
            yield
            outcome = "ok"
        except Wrong as error:
            outcome = f"WRONG: {error}"
        except Exception as error:
            outcome = self._failure(name, error, untouched)
        if self.steps.get(name, "ok") == "ok":
            self.steps[name] = outcome
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)

    def _failure(self, name: str, error: Exception, untouched: Callable[[str], None] | None) -> str:
        text = " ".join(str(error).split())[:400]
        # By name, so that a process without Gossamer can use this too.
        if not any(kind.__name__ == "GossamerError" for kind in type(error).__mro__):
            self.tracebacks[name] = "".join(traceback.format_exc().splitlines(True)[-14:])
            return f"CRASH: {type(error).__name__}: {text}"
        try:
            if untouched is not None:
                untouched(text)
        except Wrong as late:
            return f"WRONG: refused, but {late}: {text}"
        return f"refused: {text}"
