"""Gossamer makes neural networks sparse, and makes sparse networks pay."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.integrations.arrival import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()


def _started_as_command() -> bool:
    """Whether this process is `gossamer ...` or `python -m gossamer ...`."""
    name = sys.argv[0] if sys.argv else ""
    module = ("-m", "gossamer") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return module if name == "-m" else Path(name).stem in ("gossamer", "gossamer-script")


# The command line answers `--help` and mistyped words without torch, so there the names below come
# at their first use.
if TYPE_CHECKING or not _started_as_command():
    from gossamer._public import *  # noqa: F403
    from gossamer._public import __all__ as __all__
    from gossamer.methods.weights.catalogue import *  # noqa: F403 - every method by its name

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
        public = importlib.import_module("gossamer._public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        if name in globals():  # a subpackage that was imported meanwhile
            return globals()[name]
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
