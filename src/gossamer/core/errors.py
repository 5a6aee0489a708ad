"""Every error that Gossamer raises on purpose, so a caller can tell bad input from a defect."""


class GossamerError(Exception):
    """Base of all deliberate errors; the command line ends with exit code 1."""


class UsageError(GossamerError, ValueError):
    """An argument or input that cannot be used; the message names the fix (exit code 2)."""


class PatternError(UsageError):
    """A sparsity pattern that does not fit a tensor's shape or a method."""


class NonFiniteError(UsageError):
    """NaN or infinity where a number is needed; the message names the tensor."""


class FormatError(GossamerError):
    """A file that is damaged, hostile or of an unknown version (exit code 2)."""


class DisturbedError(GossamerError):
    """A measurement that other work on the machine has spoilt; nothing was kept."""


class MissingExtra(GossamerError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is needed here but not installed: pip install 'gossamer[{extra}]'"
        )
