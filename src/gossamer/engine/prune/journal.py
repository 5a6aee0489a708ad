"""The journal of a pruning run: finished units on disk, so that a killed run can go on.

A folder with `journal.json`, the fingerprint of the run, and one `unit-00012.safetensors` per
finished unit holding the pruned weights (`<layer>.weight`, in the module's own layout) and masks
(`<layer>.mask`, (out, in) as uint8); neither of a weight that the run left dense. What the method
reports of its work stands as JSON in the metadata. Every file is written under a temporary name, flushed to disk
and renamed, so a file that exists is whole. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import write_safetensors, write_whole
from gossamer.core.matrix import Weight
from gossamer.core.pattern import Pattern
from gossamer.core.support import Support
from gossamer.engine.data import check_same_run

VERSION = 1
Figures = dict[str, Mapping[str, float]]
"""By layer, what a method reports of its work."""


class Journal:
    """Opens or makes a journal folder for a run with this fingerprint.

    Raises UsageError when the folder is a file, holds other things, or belongs to another run.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        # Through JSON, so that what is compared is what a later run reads back.
        self.fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))
        text = json.dumps(self.fingerprint, sort_keys=True)
        self._digest = blake2b(text.encode(), digest_size=16).hexdigest()
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"journal {self.folder} is a file; name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "journal.json").exists():
            self._check_same_run()
            return
        if any(not name.startswith(".tmp-") for name in os.listdir(self.folder)):
            raise UsageError(
                f"journal {self.folder} is a folder with other files in it; name an empty one"
            )
        record = {"format": "gossamer-journal", "version": VERSION, "run": self.fingerprint}
        body = json.dumps(record, indent=1, sort_keys=True).encode()
        write_whole(self.folder / "journal.json", lambda path: path.write_bytes(body))

    def has(self, unit: int) -> bool:
        """Whether the unit was finished by this or an earlier run."""
        return self._path(unit).exists()

    def write(
        self,
        unit: int,
        weights: Mapping[str, Weight],
        supports: Mapping[str, Support],
        figures: Figures,
    ) -> None:
        """Record one finished unit: its weights as they are now, its supports and figures."""
        tensors: dict[str, Tensor] = {}
        for name, support in supports.items():
            tensors[f"{name}.weight"] = weights[name].tensor.cpu().contiguous()
            tensors[f"{name}.mask"] = support.mask.cpu().to(torch.uint8).contiguous()
        metadata = {"run": self._digest, "unit": str(unit), "figures": json.dumps(figures)}
        write_whole(self._path(unit), lambda path: write_safetensors(tensors, path, metadata))

    def restore(
        self,
        unit: int,
        weights: Mapping[str, Weight],
        pattern: Pattern,
        densities: Mapping[str, float],
    ) -> tuple[dict[str, Support], Figures]:
        """Write a finished unit's weights into the model and return its supports and figures.

        Raises FormatError, before any weight changes, when the file is damaged or foreign.
        """
        path = self._path(unit)
        tensors, figures = self._read(path, unit)
        supports: dict[str, Support] = {}
        for name, weight in weights.items():
            stored, mask = tensors.pop(f"{name}.weight", None), tensors.pop(f"{name}.mask", None)
            if stored is None and mask is None:
                continue
            own, shape = weight.tensor, weight.matrix().shape
            if (
                stored is None
                or mask is None
                or (stored.shape, stored.dtype) != (own.shape, own.dtype)
                or (mask.shape, mask.dtype) != (shape, torch.uint8)
            ):
                raise FormatError(f"{path}: no fitting weight and mask for {name}; {_REMEDY}")
            supports[name] = Support(mask.bool().to(own.device), pattern, densities[name])
            tensors[name] = stored
        if set(tensors) != set(supports):
            raise FormatError(f"{path}: holds layers that this unit does not have; {_REMEDY}")
        with torch.no_grad():
            for name in supports:
                weights[name].tensor.copy_(tensors[name])
        return supports, figures

    def _read(self, path: Path, unit: int) -> tuple[dict[str, Tensor], Figures]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            figures = dict(json.loads(metadata.pop("figures", "{}")))
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise FormatError(f"{path}: damaged ({error}); {_REMEDY}") from None
        if metadata != {"run": self._digest, "unit": str(unit)}:
            raise FormatError(f"{path}: belongs to another run or unit; {_REMEDY}")
        return tensors, figures

    def _check_same_run(self) -> None:
        path = self.folder / "journal.json"
        try:
            record = json.loads(path.read_bytes())
            run = record["run"]
            known = record["format"] == "gossamer-journal" and record["version"] == VERSION
        except (ValueError, KeyError, TypeError):
            raise FormatError(f"{path}: damaged; {_REMEDY}") from None
        if not known or not isinstance(run, dict):
            raise FormatError(f"{path}: not a journal of version {VERSION}; {_REMEDY}")
        remedy = "repeat that run's command with the dense model, or name another folder"
        check_same_run(f"journal {self.folder}", run, self.fingerprint, remedy)

    def _path(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:05d}.safetensors"


_REMEDY = "delete the journal folder and start again"
