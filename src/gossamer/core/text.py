"""Text of one's own as batches that calibrate a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError

ENDINGS = (".txt", ".md", ".rst", ".py")
"""Files that are read from a folder."""


def text_batches(
    tokenizer: Any,
    text: str | bytes | Path | Sequence[str],
    samples: int = 128,
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Make calibration batches from text, for `prune` and `compare`.

    Running text gives random windows of `length` tokens. A list of strings gives `samples` of them
    at random, each padded or cut to `length`, with an attention mask. That is what an encoder of
    sentences sees.

    Parameters
    ----------
    tokenizer : callable or None
        Of transformers, or anything that gives `{"input_ids": [...]}`. None where a byte is a
        token.
    text : str, bytes, path, or sequence of str
        The text itself, a file, or a folder of .txt, .md, .rst and .py files. A string that names a
        file or folder is read.
    samples : int
        Windows or strings in all.
    length : int
        Tokens in each.
    batch : int
        Batch size.
    seed : int
        Of the random choice.

    Returns
    -------
    list of dict
        Batches `{"input_ids": int64 (batch, length)}`, of strings with an `attention_mask`.

    Raises
    ------
    UsageError
        Where the text holds fewer tokens than a window.

    Examples
    --------
    >>> import gossamer as gs
    >>> data = gs.text_batches(None, "All that is gold does not glitter. " * 40, samples=4, length=32)
    >>> data[0]["input_ids"].shape
    torch.Size([4, 32])
    """
    if samples < 1 or length < 1 or batch < 1:
        raise UsageError("samples, length and batch are at least 1")
    if isinstance(text, list | tuple):
        return _rows(tokenizer, text, samples, length, batch, seed)
    raw = _read(text)
    ids = token_ids(tokenizer, raw)
    if ids.numel() <= length:
        hint = f"; there is no file {text!r}" if isinstance(text, str) and len(text) < 200 else ""
        raise UsageError(
            f"the text holds {ids.numel()} tokens; windows of {length} need more text{hint}"
        )
    return [{"input_ids": part} for part in windows(ids, samples, length, seed).split(batch)]


def windows(ids: Tensor, n: int, length: int, seed: int, ahead: int = 0) -> Tensor:
    """`n` random windows of `length` ids, each with `ahead` further ones (0 or 1) to predict.

    int64 (n, length + ahead), drawn with replacement; every window is followed by one id at least.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, ids.numel() - length, (n, 1), generator=generator)
    return ids[starts + torch.arange(length + ahead)].long()


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of every id of windows (n, length) after those before it."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def token_ids(tokenizer: Any, data: bytes | str) -> Tensor:
    """int64 (tokens,) of a text; bytes are their own ids where there is no tokenizer."""
    if tokenizer is None:
        raw = data.encode() if isinstance(data, str) else data
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if raw else _none()
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    return torch.tensor(encode(tokenizer, text), dtype=torch.int64)


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids of one text; transformers' warning about its length says nothing here."""
    if not callable(tokenizer):
        raise UsageError(
            f"tokenizer is one of transformers, or None for bytes, not {type(tokenizer).__name__}"
        )
    quiet = {"verbose": False} if hasattr(tokenizer, "deprecation_warnings") else {}
    found: Any = tokenizer(text, **quiet, **options)
    return list(found["input_ids"])


def read_text(place: Path) -> bytes:
    """A file's bytes, or those of all text files of a folder, joined by newlines.

    Raises UsageError where there is no such place, or no text in it.
    """
    if place.is_dir():
        files = [path for path in sorted(place.rglob("*")) if path.suffix in ENDINGS]
        data = b"\n".join(path.read_bytes() for path in files if path.is_file())
        if not files:
            raise UsageError(f"{place}: holds no file that ends in {', '.join(ENDINGS)}")
    elif place.is_file():
        data = place.read_bytes()
    else:
        raise UsageError(f"{place}: no such file or folder")
    if not data.strip():
        raise UsageError(f"{place}: holds no text; give a file with text in it")
    return data


def _read(text: str | bytes | Path | Any) -> str | bytes:
    if isinstance(text, bytes):
        return text
    if isinstance(text, Path):
        return read_text(text)
    if not isinstance(text, str):
        raise UsageError(f"text is text, a path or a list of strings, not {type(text).__name__}")
    short = len(text) < 1024 and "\n" not in text and "\0" not in text
    return read_text(Path(text)) if short and text.strip() and Path(text).exists() else text


def _rows(
    tokenizer: Any, lines: Sequence[str], samples: int, length: int, batch: int, seed: int
) -> list[dict[str, Tensor]]:
    known = [line for line in lines if isinstance(line, str) and line.strip()]
    if len(known) < len(lines) or not known:
        raise UsageError("a list of texts holds strings, none of them empty")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:samples]
    return padded(tokenizer, [known[index] for index in order.tolist()], length, batch)


def padded(
    tokenizer: Any, lines: Sequence[str], length: int, batch: int
) -> list[dict[str, Tensor]]:
    """The lines in order as padded rows of ids, in batches, each with its attention mask."""
    if tokenizer is None:
        ids = [list(line.encode()[:length]) for line in lines]
    else:
        ids = [encode(tokenizer, line, truncation=True, max_length=length) for line in lines]
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = next((value for value in candidates if isinstance(value, int)), 0)
    return [_padded(ids[at : at + batch], pad) for at in range(0, len(ids), batch)]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        mask[at, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)
