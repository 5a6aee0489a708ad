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


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 success, 2 bad usage or input, 1 failure, 130 interrupted."""
    try:
        run(sys.argv[1:] if argv is None else list(argv))
    except (UsageError, FormatError, MissingExtra) as error:
        _fail(error, 2)
    except (GossamerError, OSError, MemoryError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail(RuntimeError("interrupted; the same command resumes the run"), 130)
    except Exception as error:
        if os.environ.get("GOSSAMER_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error} (GOSSAMER_DEBUG=1 shows where)"
        _fail(RuntimeError(text), 1)


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
    commands = parser.add_subcommands(dest="command", metavar="COMMAND", required=False)
    for name, options in COMMANDS.items():
        summary, example = (options.__doc__ or "").strip().split("\n\n", 1)
        command = ArgumentParser(description=f"{summary} {example}", exit_on_error=False)
        command.add_argument("--config", action="config", help="read options from a YAML file")
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
