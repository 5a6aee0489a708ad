"""Measuring a model: bits per byte, similarity of embeddings, speed of decoding."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.core.result import CompressResult, PruneResult, unwrap
from gossamer.engine import hooks
from gossamer.engine.data import Batch, call, device_of, read_batches, real_tokens, rows_of
from gossamer.engine.measure.calm import Watched, watched_rounds
from gossamer.engine.progress import track
from gossamer.engine.serve.decoder import Decoder, refusal
from gossamer.engine.serve.generate import compiled_serves, next_token
from gossamer.nn.packed.active import every_token_chooses

Measurable = nn.Module | PruneResult | CompressResult
_SHORT, _MOST = 0.2, 10
"""A measurement of fewer seconds is repeated in its round, so many times at most."""
PATIENCE = 10.0
"""Seconds in which rounds that others disturbed are taken again."""


@dataclass(frozen=True)
class Speed:
    """Medians of interleaved repeats in one process; ratio is sparse over dense.

    dense: under plain transformers. sparse: as `generate` serves it, by the compiled loop where
    that serves the model. dense_compiled: the dense model under the same compiled loop, with our
    own dense kernels, so that what the loop gives is told apart from what sparsity gives.
    gain: sparse over dense in the same loop, so of sparsity alone; its range is that over the
    rounds. disturbed: how many of the rounds others used the machine in.
    """

    dense: float
    sparse: float
    ratio: float
    unit: str
    repeats: int
    threads: int
    dense_compiled: float | None = None
    loop: str = "transformers"
    gain: float = 1.0
    gain_low: float = 1.0
    gain_high: float = 1.0
    disturbed: int = 0


def bits_per_byte(
    model: Measurable,
    data: bytes,
    *,
    window: int = 256,
    batch: int = 8,
    encode: Callable[[bytes], Sequence[int]] | None = None,
    progress: str = "",
) -> float:
    """How many bits the causal language model needs per byte of `data`; lower is better.

    Without `encode` a token is a byte: windows do not overlap, and each byte after the first of
    its window is scored. With `encode` (bytes to token ids) windows share one token, so that every
    token but the very first is scored, and the total is divided by the number of bytes.
    Packed layers that choose their inputs do so for every token, as in decoding.
    progress: a name under which progress is shown on stderr; none where empty.

    Raises UsageError for data too short to score or ids outside the vocabulary, NonFiniteError
    when the model's logits are not numbers.
    """
    model = unwrap(model)
    if window < 2 or batch < 1:
        raise UsageError(f"window is at least 2 and batch at least 1, not {window} and {batch}")
    ids = torch.tensor(list(data if encode is None else encode(data)), dtype=torch.int64)
    if ids.numel() < 2:
        raise UsageError("at least two tokens of text are needed to measure bits per byte")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise UsageError(
            f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}; pass the "
            "tokenizer's encode"
        )
    nats, scored = 0.0, 0
    parts = list(_windows(ids, window, window if encode is None else window - 1, batch))
    name = progress or "bits per byte"
    with (
        hooks.evaluating(model),
        every_token_chooses(model),
        track(len(parts), bool(progress), name) as step,
    ):
        for rows in parts:
            nats += _nats(model, rows.to(device_of(model)))
            scored += rows.shape[0] * (rows.shape[1] - 1)
            step("")
    if not math.isfinite(nats):
        raise NonFiniteError("the model's logits hold NaN or inf")
    return nats / math.log(2) / (scored if encode is None else len(data))


def embedding_similarity(
    dense: Measurable, sparse: Measurable, batches: Iterable[Batch], *, progress: str = ""
) -> float:
    """Mean cosine similarity between the two models' outputs over all inputs, in [-1, 1].

    Of an encoder that is the mean of the last hidden state over real (not padding) positions, the
    embedding; of models with a head the logits, averaged likewise; a plain tensor is taken as it is.
    progress: as in `bits_per_byte`.
    """
    dense, sparse = unwrap(dense), unwrap(sparse)
    total, count = 0.0, 0
    parts, name = read_batches(batches), progress or "similarity"
    with (
        hooks.evaluating(dense),
        hooks.evaluating(sparse),
        track(len(parts), bool(progress), name) as step,
    ):
        for inputs in parts:
            first, second = (embed(model, inputs) for model in (dense, sparse))
            cosine = functional.cosine_similarity(first, second, dim=-1)
            total, count = total + float(cosine.sum()), count + cosine.numel()
            step("")
    if not math.isfinite(total):
        raise NonFiniteError("the models' outputs hold NaN or inf")
    return total / count


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Embeddings (inputs, width) in float32; see `embedding_similarity`."""
    output: Any = call(model, batch)
    hidden = _first_tensor(output)
    if hidden is None:
        raise UsageError(
            f"{type(model).__name__} returns a {type(output).__name__}; what is compared is a "
            "tensor, last_hidden_state or logits"
        )
    hidden = hidden.float()
    if hidden.dim() < 3:
        return hidden
    mask = real_tokens(batch)
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask.to(hidden.device).unsqueeze(-1).float()
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def _first_tensor(output: Any) -> Tensor | None:
    """The part of a model's output that is compared."""
    for name in ("last_hidden_state", "logits"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, list | tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def decode_speed(
    dense: Measurable,
    sparse: Measurable,
    ids: Tensor,
    new_tokens: int = 32,
    repeats: int = 5,
    *,
    progress: bool = False,
) -> Speed:
    """Tokens per second of greedy decoding with a key-value cache, dense against sparse.

    ids: (batch, tokens) prompt. The prompt's own pass is not timed. Both models decode in turns,
    after one untimed warm-up each, so that both see the same machine. Rounds in which others used
    the machine are taken again for some seconds.
    """
    dense, sparse = unwrap(dense), unwrap(sparse)
    if new_tokens < 1 or repeats < 1:
        raise UsageError(f"new_tokens and repeats are at least 1, not {new_tokens} and {repeats}")
    runs = {"dense": (dense, False), "sparse": (sparse, compiled_serves(sparse, ids, new_tokens))}
    if runs["sparse"][1] and refusal(dense, ids.shape[1] + new_tokens) is None:
        runs["dense_compiled"] = (dense, True)

    def turn() -> dict[str, float]:
        return {
            name: _steady(
                partial(
                    _compiled_seconds if compiled else _decode_seconds,
                    model, ids.to(device_of(model)), new_tokens,
                )
            )
            for name, (model, compiled) in runs.items()
        }  # fmt: skip

    with hooks.evaluating(dense), hooks.evaluating(sparse):
        watched = _rounds(turn, repeats, progress, f"speed of decoding {new_tokens} tokens")
    loop = "compiled" if runs["sparse"][1] else "transformers"
    return _speed(watched, ids.shape[0] * new_tokens, "tokens/s", loop)


def encode_speed(
    dense: Measurable,
    sparse: Measurable,
    batches: Iterable[Batch],
    repeats: int = 5,
    *,
    progress: bool = False,
) -> Speed:
    """Inputs per second over all batches, dense against sparse, in turns after a warm-up.

    An input is a row of the first dimension. Disturbed rounds are taken again, as in `decode_speed`.
    """
    dense, sparse = unwrap(dense), unwrap(sparse)
    rows = read_batches(batches)
    if repeats < 1:
        raise UsageError(f"repeats is at least 1, not {repeats}")

    def turn() -> dict[str, float]:
        return {
            name: _steady(partial(_encode_seconds, model, rows))
            for name, model in (("dense", dense), ("sparse", sparse))
        }

    with hooks.evaluating(dense), hooks.evaluating(sparse):
        watched = _rounds(turn, repeats, progress, "speed on batches")
    return _speed(watched, sum(map(rows_of, rows)), "inputs/s", "transformers")


def _rounds(
    turn: Callable[[], Mapping[str, float]], repeats: int, progress: bool, what: str
) -> Watched:
    """One untimed round, then the timed ones."""
    with track(None, progress, what) as step:
        turn()
        step("")
        return watched_rounds(turn, repeats, PATIENCE, step)


def _steady(seconds: Callable[[], float]) -> float:
    """The median of one measurement, or of several where one is too short to be trusted."""
    first = seconds()
    more = min(_MOST, int(_SHORT / max(first, 1e-9)))
    return statistics.median([first, *(seconds() for _ in range(more))])


def _speed(watched: Watched, count: int, unit: str, loop: str) -> Speed:
    """Rates of `count` tokens or inputs, from the seconds of each round."""
    times = watched.seconds
    rates = {name: count / statistics.median(taken) for name, taken in times.items()}
    baseline = "dense_compiled" if "dense_compiled" in times else "dense"
    gains = [dense / sparse for dense, sparse in zip(times[baseline], times["sparse"], strict=True)]
    return Speed(
        dense=rates["dense"],
        sparse=rates["sparse"],
        ratio=rates["sparse"] / rates["dense"],
        unit=unit,
        repeats=len(gains),
        threads=torch.get_num_threads(),
        dense_compiled=rates.get("dense_compiled"),
        loop=loop,
        gain=rates["sparse"] / rates[baseline],
        gain_low=min(gains),
        gain_high=max(gains),
        disturbed=watched.disturbed,
    )


def _encode_seconds(model: nn.Module, batches: Sequence[Batch]) -> float:
    _wait(device_of(model))
    start = time.perf_counter()
    for batch in batches:
        call(model, batch)
    _wait(device_of(model))
    return time.perf_counter() - start


def _decode_seconds(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    step, cache = next_token(model, ids, None)
    _wait(ids.device)
    start = time.perf_counter()
    for _ in range(new_tokens):
        step, cache = next_token(model, step, cache)
    _wait(ids.device)
    return time.perf_counter() - start


def _compiled_seconds(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    decoder = Decoder(model, ids.shape[1] + new_tokens)
    token = int(decoder.prefill(ids).argmax())
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = int(decoder.step(token).argmax())
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _windows(ids: Tensor, window: int, stride: int, batch: int) -> Iterable[Tensor]:
    """Batches of full windows, then the shorter last one if it has a token to score."""
    starts = range(0, max(0, ids.numel() - 1), stride)
    full = [ids[at : at + window] for at in starts if at + window <= ids.numel()]
    for at in range(0, len(full), batch):
        yield torch.stack(full[at : at + batch])
    tail = ids[len(full) * stride :]
    if tail.numel() > 1:
        yield tail.unsqueeze(0)


def _nats(model: nn.Module, rows: Tensor) -> float:
    logits = model(input_ids=rows).logits[:, :-1].float()
    return float(
        functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1), reduction="sum"
        )
    )
