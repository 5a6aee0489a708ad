"""Registering with transformers when it is imported, whichever of the two comes first."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULE = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now where transformers is imported, else as soon as its models are.

    Until then nothing is imported; a finder waits for the one module and takes itself away.
    """
    if MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Arrival) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Arrival())


class _Arrival(MetaPathFinder):
    """Finds nothing itself: it lets the others find the module and registers once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, which registers after it was executed."""
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from gossamer.integrations.quantizer import register

        register()
    except Exception as error:  # another version of transformers must still be importable
        logging.getLogger("gossamer").warning("transformers cannot load packed folders: %s", error)
