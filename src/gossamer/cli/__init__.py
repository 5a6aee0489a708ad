"""The command line: one file per command, each a dataclass of options with `run()`.

A command's module is imported when it is called for, so that `gossamer --help` needs no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import gossamer
from gossamer.cli.options import DEBUG, DEBUG_HELP, parse
from gossamer.core.errors import FormatError, GossamerError, MissingExtra, UsageError

COMMANDS = {
    "compress": "Prune a model, pack it, measure quality, size and speed, and write it.",
    "generate": "Continue a text by greedy decoding.",
    "compare": "Measure two models side by side: quality, bytes and speed.",
    "inspect": "Show what a compressed folder holds and what serves each layer.",
    "report": "Write the HTML report of a finished compression anew.",
    "train": "Train a sparse network, with checkpoints, and write model and report.",
    "methods": "List the methods, or show what is known of one.",
    "check": "Try what a method's paper claims on a small task, and print the verdict.",
    "testbed": "List small problems, models and data to try methods on, or fetch one.",
    "calibrate": "Measure how fast every kernel is on this machine.",
    "bench": "Check the kernels, then time them against other engines.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 success, 2 bad usage or input, 1 failure, 130 interrupted.

    With `--debug` anywhere in `argv`, or GOSSAMER_DEBUG set, failures that are not a deliberate
    error are raised with their traceback instead of told in one line.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    debug = DEBUG in words or bool(os.environ.get("GOSSAMER_DEBUG"))
    words = [word for word in words if word != DEBUG]
    try:
        with _log_on_stderr():
            run(words)
    except (UsageError, FormatError, MissingExtra) as error:
        _fail(error, 2)
    except GossamerError as error:
        _fail(error, 1)
    except KeyboardInterrupt as stop:
        _fail(RuntimeError(f"interrupted{stop}"), 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError | MemoryError):  # a full disk, say: no fault of the program
            _fail(error, 1)
        text = f"{type(error).__name__}: {error}; this should not happen: please report it with "
        _fail(RuntimeError(text + "what the same command prints with --debug"), 1)


def run(words: list[str]) -> None:
    """Parse the words and run their command; raises instead of exiting."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] == "--version":
        print(f"gossamer {gossamer.__version__}")
    elif words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        what = "option" if words[0].startswith("-") else "command"
        raise UsageError(f"unknown {what} {words[0]!r}{hint}; see gossamer --help")
    else:
        chosen = parse(words[0], command(words[0]), words[1:])
        try:
            chosen.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(chosen.again() if hasattr(chosen, "again") else "") from None


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what the library logs, one line each, while a command runs."""
    log, handler = logging.getLogger("gossamer"), logging.StreamHandler(sys.stderr)
    level, spreads = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = spreads


def command(name: str) -> type[Any]:
    """The dataclass of a command, imported now."""
    module = importlib.import_module(f"gossamer.cli.{name}")
    found: type[Any] = getattr(module, name.title())
    return found


def _help() -> str:
    rows = [f"  {name:<11}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gossamer COMMAND [options]",
            "",
            "Makes neural networks sparse, and makes sparse networks pay.",
            "",
            *rows,
            "",
            "  gossamer COMMAND --help explains every option of a command",
            "  --version  print the version",
            f"  --debug    {DEBUG_HELP}",
            "",
            "First steps:",
            "  gossamer compress --out small            the bundled model, 50% sparsity",
            "  gossamer compress MODEL --out small      a Hugging Face folder or name",
            '  gossamer generate small --prompt "import "',
        ]
    )


def _fail(error: BaseException, code: int) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"gossamer: error: {text}", file=sys.stderr)
    raise SystemExit(code)
