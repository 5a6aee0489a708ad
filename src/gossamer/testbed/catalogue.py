"""What the testbed offers: small problems, what is bundled, and what can be fetched.

`catalogue.toml` lists the packages, each pinned by a digest. Reading it needs no torch.
"""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from gossamer.core.files import cache_folder
from gossamer.core.words import known
from gossamer.testbed.archives import Archive


@dataclass(frozen=True)
class Package:
    """A model or data set that can be fetched.

    kind: `model` or `data`. download: bytes of the package. make: the function of `conversions`
    that turns what was unpacked into the folder; empty where that is the folder. load: the function
    there that gives the model. needs: packages that both import.
    """

    name: str
    kind: str
    what: str
    licence: str
    download: int
    archive: Archive
    make: str = ""
    load: str = ""
    needs: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """The folder in this user's cache folder, whether or not it is there."""
        return cache_folder() / ("models" if self.kind == "model" else "data") / self.name

    @property
    def present(self) -> bool:
        """Whether it was fetched."""
        return self.place.is_dir()


@dataclass(frozen=True)
class Bundled:
    """A problem, model or text that comes with the library; needs: packages it imports."""

    name: str
    kind: str
    what: str
    use: str
    needs: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        """Whether what it imports is installed."""
        return all(importlib.util.find_spec(each) is not None for each in self.needs)


BUNDLED = (
    Bundled("digits", "problem", "scikit-learn's handwritten digits for a small perceptron",
            "gossamer.testbed.Digits()", ("sklearn",)),
    Bundled("text", "problem", "Python's documentation and code, byte by byte, for a tiny Llama",
            "gossamer.testbed.Text()", ("transformers",)),
    Bundled("testbed:lm", "model", "a byte-level Llama of 3.8 million weights, trained",
            "gossamer.testbed.language_model()", ("transformers",)),
    Bundled("testbed:text", "data", "documentation and code: 367 kB seen by testbed:lm, 192 kB held "
            "out", "gossamer.testbed.heldout_text()"),
)  # fmt: skip
"""What needs no download."""


@cache
def packages() -> Mapping[str, Package]:
    """Everything that can be fetched, by name."""
    text = (resources.files("gossamer.testbed") / "catalogue.toml").read_text("utf-8")
    return {name: _package(name, dict(row)) for name, row in tomllib.loads(text).items()}


def package(name: str) -> Package:
    """The package of a name; raises UsageError with near ones."""
    found: Package = known(name, packages(), "package of the testbed")
    return found


def _package(name: str, row: dict[str, object]) -> Package:
    archive = dict(row.pop("archive"))  # type: ignore[call-overload]
    archive["members"] = tuple(archive["members"])
    row["needs"] = tuple(row.get("needs", ()))  # type: ignore[arg-type]
    return Package(name=name, archive=Archive(**archive), **row)  # type: ignore[arg-type]
