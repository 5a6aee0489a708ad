"""Text that calibrates methods of activations."""

from __future__ import annotations

from gossamer.cli.inputs import read_text
from gossamer.core.text import windows
from gossamer.engine.data import Batch
from gossamer.engine.measure.tasks import Subject

SAMPLES, LENGTH = 16, 256
"""Windows, and tokens in each: 4,096 inputs of every layer."""


def calibration(subject: Subject, source: str) -> list[Batch]:
    """Random windows of a text, or of the bundled one, for `--activations`."""
    from gossamer.testbed import calibration_text

    ids = subject.ids(read_text(source, "--data", calibration_text)[: 1 << 20])
    limit = getattr(getattr(subject.model, "config", None), "max_position_embeddings", LENGTH)
    return list(windows(ids, SAMPLES, min(LENGTH, limit), 0).split(4))
