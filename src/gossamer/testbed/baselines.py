"""What any text model must beat: xz, and an interpolated 5-gram model of bytes."""

from __future__ import annotations

import lzma

import numpy as np


def xz_bits_per_byte(text: bytes, primer: bytes = b"") -> float:
    """Bits per byte of xz at its strongest; with `primer`, of the text after having seen it."""
    return 8 * (_xz(primer + text) - (_xz(primer) if primer else 0)) / len(text)


def ngram_bits_per_byte(text: bytes, training: bytes, order: int = 5) -> float:
    """Bits per byte of an interpolated byte model with Witten-Bell smoothing.

    P_k(c | context) = (count(context c) + T P_{k-1}(c)) / (count(context) + T), T the number of
    kinds of byte seen after the context, down to the uniform distribution. Source: The zero-
    frequency problem (1991). O(order * n log n) time.
    """
    data = np.frombuffer(text, dtype=np.uint8).astype(np.uint64)
    seen = np.frombuffer(training, dtype=np.uint8).astype(np.uint64)
    probability = np.full(len(data), 1 / 256)
    for length in range(1, order + 1):
        grams, counts = np.unique(_grams(seen, length), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        asked = _grams(data, length)
        hits = _lookup(grams, counts, asked)
        total = _lookup(contexts, totals, asked >> np.uint64(8))
        kind = _lookup(contexts, kinds, asked >> np.uint64(8))
        here = probability[length - 1 :]
        probability[length - 1 :] = np.where(
            total > 0, (hits + kind * here) / np.maximum(total + kind, 1), here
        )
    return float(-np.log2(probability).mean())


def _grams(data: np.ndarray, length: int) -> np.ndarray:
    """Every run of `length` bytes as one number, the last byte lowest."""
    result = np.zeros(len(data) - length + 1, dtype=np.uint64)
    for offset in range(length):
        result = (result << np.uint64(8)) | data[offset : len(data) - length + 1 + offset]
    return result


def _lookup(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)


def _xz(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))
