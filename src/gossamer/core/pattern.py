"""Sparsity patterns: which weights of an (out, in) matrix may be zero together.

Patterns are immutable data. `density` is the fraction kept; N:M keeps `keep` of every `group`
consecutive weights along the last axis, which is the contraction axis of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

from gossamer.core.errors import PatternError

Scope: TypeAlias = Literal["tensor", "row", "column", "global"]
SCOPES = ("tensor", "row", "column", "global")
WIDEST = 9999
"""The largest group of N:M: four digits, as `parse_pattern` reads."""


@dataclass(frozen=True)
class Unstructured:
    """Any single weight.

    Parameters
    ----------
    scope : {"tensor", "row", "column", "global"}
        Over what weights are ranked against each other.
    """

    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        _check_scope(self.scope, SCOPES, "Unstructured")


@dataclass(frozen=True)
class NM:
    """Exactly `keep` non-zeros in every `group` consecutive weights of a row.

    A mask may have wider groups than the N:M kernels store. `gossamer.ops.nm` checks those where a
    layer is packed or read from a file.

    Parameters
    ----------
    keep : int
        How many are kept, 1 <= keep < group.
    group : int
        Of how many, at most 9999.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        whole = _is_int(self.keep) and _is_int(self.group)
        if not (whole and 0 < self.keep < self.group <= WIDEST):
            raise PatternError(
                f"N:M needs whole numbers 0 < keep < group <= {WIDEST}, not "
                f"{self.keep}:{self.group}"
            )

    @property
    def density(self) -> float:
        """The only density that the pattern admits: keep / group."""
        return self.keep / self.group


@dataclass(frozen=True)
class Block:
    """Tiles of `rows` x `cols` weights that are kept or removed whole.

    Parameters
    ----------
    rows, cols : int
        The size of a tile, in outputs and inputs.
    scope : {"tensor", "global"}
        Over what tiles are ranked against each other.
    """

    rows: int
    cols: int
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        if not (_is_int(self.rows) and _is_int(self.cols) and self.rows > 0 and self.cols > 0):
            raise PatternError(f"Block needs rows, cols >= 1, not {self.rows}x{self.cols}")
        _check_scope(self.scope, ("tensor", "global"), "Block")


@dataclass(frozen=True)
class Channel:
    """Whole rows (`dim=0`, output channels) or whole columns (`dim=1`, input channels).

    Parameters
    ----------
    dim : {0, 1}
        Which of the two.
    scope : {"tensor", "global"}
        Over what channels are ranked against each other.
    """

    dim: int = 0
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        if not _is_int(self.dim) or self.dim not in (0, 1):
            raise PatternError(f"Channel needs dim 0 (rows) or 1 (columns), not {self.dim!r}")
        _check_scope(self.scope, ("tensor", "global"), "Channel")


Pattern: TypeAlias = Unstructured | NM | Block | Channel

_FORMS = "unstructured[:tensor|row|column|global], N:M such as 2:4, block:RxC, channel:0|1"


def parse_pattern(text: str) -> Pattern:
    """Read a pattern as the command line and the file format write it.

    Parameters
    ----------
    text : str
        `unstructured`, `unstructured:row`, `2:4`, `block:4x1` or `channel:0`, for example. Block
        and channel take an optional `:global`.

    Returns
    -------
    Pattern
        Equal to what `format_pattern` was given.

    Raises
    ------
    PatternError
        For anything else.

    Examples
    --------
    >>> import gossamer as gs
    >>> gs.parse_pattern("2:4")
    NM(keep=2, group=4)
    """
    word = text.strip().lower()
    if match := re.fullmatch(r"unstructured(?::(\w+))?", word):
        return Unstructured(match[1] or "tensor")  # type: ignore[arg-type]
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", word):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"block:(\d{1,6})x(\d{1,6})(?::(\w+))?", word):
        return Block(int(match[1]), int(match[2]), match[3] or "tensor")  # type: ignore[arg-type]
    if match := re.fullmatch(r"channel(?::(\d))?(?::(\w+))?", word):
        return Channel(int(match[1] or 0), match[2] or "tensor")  # type: ignore[arg-type]
    near = get_close_matches(word.partition(":")[0], ("unstructured", "block", "channel"), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PatternError(f"unknown pattern {text!r}; {hint}write one of: {_FORMS}")


def format_pattern(pattern: Pattern) -> str:
    """Write a pattern as the text that `parse_pattern` reads back to an equal one.

    Parameters
    ----------
    pattern : Pattern
        Such as `NM(2, 4)`.

    Examples
    --------
    >>> import gossamer as gs
    >>> gs.format_pattern(gs.Block(4, 1))
    'block:4x1'
    """
    match pattern:
        case Unstructured():
            return "unstructured" + _scope_suffix(pattern.scope)
        case NM():
            return f"{pattern.keep}:{pattern.group}"
        case Block():
            return f"block:{pattern.rows}x{pattern.cols}" + _scope_suffix(pattern.scope)
        case Channel():
            return f"channel:{pattern.dim}" + _scope_suffix(pattern.scope)


def pattern_kind(pattern: Pattern) -> str:
    """The word that cards use for the pattern: unstructured, nm, block or channel."""
    return {Unstructured: "unstructured", NM: "nm", Block: "block", Channel: "channel"}[
        type(pattern)
    ]


def check_pattern(pattern: Pattern, shape: Sequence[int], name: str) -> None:
    """Raise PatternError, naming the tensor, unless `pattern` divides a matrix of `shape`."""
    if len(shape) != 2:
        if isinstance(pattern, Unstructured) and pattern.scope in ("tensor", "global"):
            return
        raise PatternError(
            f"{name or 'tensor'}: {format_pattern(pattern)} needs a matrix, not shape "
            f"{tuple(shape)}"
        )
    rows, cols = shape
    if isinstance(pattern, NM) and cols % pattern.group:
        raise PatternError(
            f"{name or 'tensor'}: {format_pattern(pattern)} needs an input dimension divisible by "
            f"{pattern.group}, not {cols}; exclude this layer or choose another pattern"
        )
    if isinstance(pattern, Block) and (rows % pattern.rows or cols % pattern.cols):
        raise PatternError(
            f"{name or 'tensor'}: {format_pattern(pattern)} does not tile a {rows}x{cols} matrix; "
            "exclude this layer or choose another block"
        )


def _scope_suffix(scope: str) -> str:
    return "" if scope == "tensor" else f":{scope}"


def _check_scope(scope: str, allowed: tuple[str, ...], what: str) -> None:
    if scope not in allowed:
        raise PatternError(f"{what} scope is one of {', '.join(allowed)}, not {scope!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
