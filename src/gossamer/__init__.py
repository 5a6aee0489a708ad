"""Gossamer makes neural networks sparse, and makes sparse networks pay."""

import importlib
from typing import TYPE_CHECKING

from gossamer.core.version import VERSION
from gossamer.integrations.arrival import register_with_transformers

__version__ = VERSION

register_with_transformers()

# Public names come at their first use, so that the command line answers `--help` without torch.
if TYPE_CHECKING:
    from gossamer._public import *  # noqa: F403
    from gossamer._public import __all__ as __all__
    from gossamer.methods import activations as activations
    from gossamer.methods import attention as attention
    from gossamer.methods import weights as weights
else:

    def __getattr__(name: str) -> object:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
        topic = importlib.import_module("gossamer.methods").topic(name)
        if topic is not None:
            globals()[name] = topic
            return topic
        public = importlib.import_module("gossamer._public")
        if name == "__all__" or name in public.__all__:
            globals()[name] = value = getattr(public, name)
            return value
        if name in globals():  # a subpackage that was imported meanwhile
            return globals()[name]
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")

    def __dir__() -> list[str]:
        found = importlib.import_module("gossamer.methods")
        built = {name for name in found.TOPICS if found.topic(name)}
        return sorted({*globals(), *built, *importlib.import_module("gossamer._public").__all__})
