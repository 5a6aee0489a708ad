"""One step of a diffusion model as plain data, and what a method answers for one call in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from gossamer.core.errors import UsageError

Kind = Literal["dense", "chosen", "reused"]


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens of a call lie in a video, frame after frame, row after row, beside text.

    Parameters
    ----------
    frames, height, width : int
        Of the video, in tokens. An image has one frame.
    text : int
        Tokens of text in the same sequence.
    text_first : bool
        Whether text stands before the video; behind it otherwise.

    Examples
    --------
    >>> import gossamer as gs
    >>> gs.TokenGrid(8, 16, 16, text=4).tokens
    2052
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = True

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"TokenGrid: {name} is a whole number from {least}, not {value!r}")

    @property
    def frame(self) -> int:
        """Tokens of a frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.frames * self.frame

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.video + self.text

    @property
    def first(self) -> int:
        """Where the video begins."""
        return self.text if self.text_first else 0

    @property
    def text_at(self) -> slice:
        """Where the text is."""
        return slice(0, self.text) if self.text_first else slice(self.video, self.tokens)

    @property
    def video_at(self) -> slice:
        """Where the video is."""
        return slice(self.first, self.first + self.video)


@dataclass(frozen=True)
class DenoisingStep:
    """Where a call stands in the run of a diffusion model.

    Attributes
    ----------
    number, total : int
        The step, from 0, and how many the run has.
    branch : str
        Which of several forwards of a step, such as those of guidance with text and without.
        Branches have states of their own.
    grid : TokenGrid or None
        How the tokens lie; None where that was not said.
    """

    number: int
    total: int
    branch: str = ""
    grid: TokenGrid | None = None

    def first_share(self, share: float) -> bool:
        """Whether this step is among the first `share` of all, in [0, 1]."""
        return self.number < share * self.total - 1e-9


@dataclass(frozen=True, eq=False)
class Attended:
    """What a method answers for one call.

    Attributes
    ----------
    output : Tensor
        (batch, heads, queries, value width), of the query's dtype.
    pairs : int
        Pairs computed for it, over batches and heads. A pooled key is one key.
    state : object
        What the same layer and branch is given at the next step: tensors and plain data in tuples,
        mappings or dataclasses. It is never changed in place.
    kind : str
        `dense`: all pairs. `chosen`: the pairs were chosen in this call. `reused`: at an earlier
        step.
    search_pairs : int
        Pairs whose exact products were computed only in order to choose.
    figures : mapping of str to float
        Counts that are summed up over all calls, such as of ratios that had to be cut.
    """

    output: Tensor
    pairs: int
    state: Any = None
    kind: Kind = "chosen"
    search_pairs: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
