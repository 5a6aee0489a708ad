"""The command line: one file per command, each a dataclass of options with `run()`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from gossamer.cli.bench import Bench
from gossamer.cli.calibrate import Calibrate
from gossamer.cli.compare import Compare
from gossamer.cli.compress import Compress
from gossamer.cli.generate import Generate
from gossamer.cli.inspect import Inspect
from gossamer.cli.methods import Methods
from gossamer.cli.report import Report
from gossamer.cli.train import Train
from gossamer.core.errors import FormatError, GossamerError, MissingExtra, UsageError

COMMANDS: dict[str, type[Any]] = {
    "compress": Compress,
    "train": Train,
    "bench": Bench,
    "calibrate": Calibrate,
    "compare": Compare,
    "inspect": Inspect,
    "generate": Generate,
    "methods": Methods,
    "report": Report,
}

DEBUG = "--debug"
_DEBUG_HELP = "show the whole traceback of an unexpected failure"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 success, 2 bad usage or input, 1 failure, 130 interrupted.

    With `--debug` anywhere in `argv`, or GOSSAMER_DEBUG set, failures that are not a deliberate
    error are raised with their traceback instead of told in one line.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    debug = DEBUG in words or bool(os.environ.get("GOSSAMER_DEBUG"))
    try:
        run([word for word in words if word != DEBUG])
    except (UsageError, FormatError, MissingExtra) as error:
        _fail(error, 2)
    except GossamerError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail(RuntimeError("interrupted; the same command resumes the run"), 130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError | MemoryError):  # a full disk, say: no fault of the program
            _fail(error, 1)
        text = f"{type(error).__name__}: {error}; this should not happen: please report it with "
        _fail(RuntimeError(text + "what the same command prints with --debug"), 1)


def run(argv: list[str]) -> None:
    """Parse `argv` and run its command; raises instead of exiting."""
    try:
        from jsonargparse import ArgumentParser, Namespace
    except ImportError:
        raise MissingExtra("jsonargparse", "cli") from None
    parser = ArgumentParser(
        prog="gossamer",
        description="Makes neural networks sparse, and makes sparse networks pay.",
        exit_on_error=False,
    )
    parser.add_argument(DEBUG, action="store_true", help=_DEBUG_HELP)
    commands = parser.add_subcommands(dest="command", metavar="COMMAND", required=False)
    for name, options in COMMANDS.items():
        summary, example = (options.__doc__ or "").strip().split("\n\n", 1)
        command = ArgumentParser(description=f"{summary} {example}", exit_on_error=False)
        command.add_argument("--config", action="config", help="read options from a YAML file")
        command.add_argument(DEBUG, action="store_true", help=_DEBUG_HELP)
        command.add_class_arguments(options, as_group=False)
        commands.add_subcommand(name, command, help=summary)
    if not argv:
        parser.print_help()
        return
    try:
        parsed: Namespace = parser.parse_args(_normal(argv))
    except Exception as error:
        # jsonargparse wraps what the user typed wrongly in several kinds of exception
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(" ".join(lines)[:400] + "; see gossamer --help") from None
    if parsed[parsed.command].debug:  # `main` takes the flag, so a file said it
        raise UsageError(f"{DEBUG} goes on the command line, not into a file of options")
    options = COMMANDS[parsed.command]
    names = {field.name for field in dataclasses.fields(options)}
    values = {k: v for k, v in vars(parsed[parsed.command]).items() if k in names}
    options(**values).run()


def _normal(argv: list[str]) -> list[str]:
    """Flags as people type them: `--json` for `--json=true`, `--eval-data` for `--eval_data`."""
    options = COMMANDS.get(argv[0])
    fields = dataclasses.fields(options) if options else ()
    switches = {f"--{field.name}" for field in fields if field.type == "bool"}
    result = argv[:1]
    for word in argv[1:]:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        result.append(f"{word}=true" if word in switches else word)
    return result


def _fail(error: BaseException, code: int) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"gossamer: error: {text}", file=sys.stderr)
    raise SystemExit(code)
