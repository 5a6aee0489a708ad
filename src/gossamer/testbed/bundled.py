"""The bundled small model, text and data behind the defaults and the tests."""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra
from gossamer.core.text import text_batches


def model_folder() -> Any:
    """The folder of the bundled model, as Hugging Face lays it out."""
    return resources.files("gossamer.testbed") / "data" / "lm"


def language_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The bundled byte-level causal language model (LlamaForCausalLM, 256 tokens), in eval mode.

    Raises MissingExtra where transformers is not installed.
    """
    return _llama(model_folder(), dtype)


def symbol_model() -> nn.Module:
    """The bundled model of the language of `gossamer.testbed.symbols`, float32 and in eval mode.

    Raises MissingExtra where transformers is not installed.
    """
    return _llama(resources.files("gossamer.testbed") / "data" / "symbols", torch.float32)


def heldout_text() -> bytes:
    """Text that the bundled model has not seen: documentation and code, about 200 kB."""
    return _text("heldout.txt")


def calibration_text() -> bytes:
    """Text from the model's training set, about 400 kB."""
    return _text("calibration.txt")


def calibration_batches(
    n: int = 128, length: int = 256, batch: int = 8, seed: int = 0, text: bytes | None = None
) -> list[dict[str, Tensor]]:
    """`n` random windows of `length` bytes as batches {"input_ids": int64 (batch, length)}.

    text: other bytes than the bundled calibration text. Raises UsageError when it is too short.
    """
    data = calibration_text() if text is None else text
    return text_batches(None, data, samples=n, length=length, batch=batch, seed=seed)


def digits(test_share: float = 0.25, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8x8 digits: (train x, train y, test x, test y).

    x float32 (n, 1, 8, 8) in [0, 1], y int64. Raises MissingExtra where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "vision") from None
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = round(test_share * len(y))
    test, rest = order[:held], order[held:]
    return x[rest], y[rest], x[test], y[test]


def _text(name: str) -> bytes:
    return (resources.files("gossamer.testbed") / "data" / name).read_bytes()


def _llama(place: Any, dtype: torch.dtype) -> nn.Module:
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    with resources.as_file(place) as folder:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval()
