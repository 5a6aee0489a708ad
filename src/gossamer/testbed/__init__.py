"""Small problems, the bundled model and text, and real models and data out of packages.

Names come at their first use, so that listing what is there needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

__all__ = [
    "Digits",
    "Text",
    "calibration_batches",
    "calibration_text",
    "digits",
    "fetch",
    "folder",
    "heldout_text",
    "language_model",
    "load",
    "model_folder",
    "symbol_model",
    "video_transformer",
]

if TYPE_CHECKING:
    from gossamer.testbed.bundled import (
        calibration_batches,
        calibration_text,
        digits,
        heldout_text,
        language_model,
        model_folder,
        symbol_model,
    )
    from gossamer.testbed.language import Text
    from gossamer.testbed.packaged import fetch, folder, load
    from gossamer.testbed.video import video_transformer
    from gossamer.testbed.vision import Digits
else:
    _FILES = {"Digits": "vision", "Text": "language", "video_transformer": "video"} | dict.fromkeys(
        ("fetch", "folder", "load"), "packaged"
    )

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'gossamer.testbed' has no attribute {name!r}")
        module = importlib.import_module(f"gossamer.testbed.{_FILES.get(name, 'bundled')}")
        return getattr(module, name)
