"""The options of a command: a dataclass read as a parser, a help page and checked values.

Each field is an option. Its attribute docstring is the help line; a Literal lists the choices.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from gossamer.core.errors import MissingExtra, UsageError

Share = Annotated[float, "share"]
"""A fraction, which may be written as 0.5 or 50%."""
DEBUG = "--debug"
DEBUG_HELP = "show the whole traceback of an unexpected failure"
_METAVARS = {int: "N", float: "X", dict: "MAP", list: "PATTERN"}


@dataclass(frozen=True)
class Option:
    """One field of a command: how it is written, what it takes, what it means."""

    name: str
    kind: Any
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def flag(self) -> str:
        """As people type it."""
        return "--" + self.name.replace("_", "-")

    def read(self, value: Any) -> Any:
        """A word of the command line, or what a YAML file holds, as the field's type."""
        if value is None and self.optional:
            return None
        try:
            return self._read(value)
        except UsageError:
            raise
        except (ValueError, TypeError):
            raise UsageError(f"{self.flag} takes {self._wanted()}, not {value!r}") from None

    def _read(self, value: Any) -> Any:
        if self.kind is bool:
            return _flag(value)
        if self.kind is list:
            words = value if isinstance(value, list) else str(value).split(",")
            return [str(word).strip() for word in words if str(word).strip()]
        if self.kind is dict:
            return value if isinstance(value, dict) else _mapping(str(value))
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(
                f"{self.flag} is one of {', '.join(self.choices)}, not {value!r}{hint}"
            )
        return fraction(value) if self.kind == Share else self.kind(str(value))

    def _wanted(self) -> str:
        if self.kind == Share:
            return "a fraction such as 0.5 or 50%"
        kinds = {int: "a whole number", float: "a number", bool: "no value",
                 dict: "arguments such as every=50,drop=0.3"}  # fmt: skip
        return kinds.get(self.kind, "text")


def fraction(text: Any) -> float:
    """0.5 from `0.5` or `50%`; raises ValueError for anything else."""
    word = str(text).strip()
    return float(word[:-1]) / 100 if word.endswith("%") else float(word)


def options_of(command: type[Any]) -> list[Option]:
    """The fields of the dataclass, each with its docstring."""
    hints = typing.get_type_hints(command, include_extras=True)
    words = _docstrings(command)
    return [
        _option(field, hints[field.name], words[field.name])
        for field in dataclasses.fields(command)
    ]


def parse(name: str, command: type[Any], words: Sequence[str]) -> Any:
    """The command with its options as `words` say; raises UsageError, prints help and exits 0.

    Words of the command line go before those of a `--config` file, which go before the defaults.
    """
    options = {option.name: option for option in options_of(command)}
    parser = _parser(name, command, list(options.values()))
    try:
        found, unknown = parser.parse_known_intermixed_args([_hyphens(word) for word in words])
    except argparse.ArgumentError as error:
        message = error.message.replace("ignored explicit argument", "takes no value, not")
        raise UsageError(f"{error.argument_name}: {message}; {_see(name)}") from None
    for word in unknown:
        _refuse(name, word, [option.flag for option in options.values()])
    given = {k: v for k, v in vars(found).items() if k in options}
    _place(name, command, getattr(found, "words", []), given)
    values = {**_file(name, found.config, options), **given}
    values = {key: options[key].read(_joined(options[key], value)) for key, value in values.items()}
    absent = [o for o in options.values() if o.default is MISSING and o.name not in values]
    if absent:
        what = absent[0].name.upper()
        how = what if absent[0].name in _positional(command) else f"{absent[0].flag} {what}"
        raise UsageError(f"{what} is missing: gossamer {name} {how}; {_see(name)}")
    return command(**values)


def _joined(option: Option, value: Any) -> Any:
    """What a repeated option gathered: one list of all words."""
    return ",".join(value) if option.kind is list and isinstance(value, list) else value


def _parser(name: str, command: type[Any], options: list[Option]) -> argparse.ArgumentParser:
    summary, example, *rest = (command.__doc__ or "").strip().split("\n\n")
    places = _positional(command)
    parser = argparse.ArgumentParser(
        prog=f"gossamer {name}",
        usage=f"gossamer {name} {''.join(f'[{x.upper()}] ' for x in places)}[options]",
        description="\n\n".join([summary, *map(inspect.cleandoc, rest)]),
        epilog=inspect.cleandoc(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for option in options:
        if option.kind is bool:
            parser.add_argument(
                option.flag, action="store_true", dest=option.name, help=_line(option)
            )
            continue
        parser.add_argument(
            option.flag, dest=option.name, help=_line(option), metavar=_metavar(option),
            action="append" if option.kind is list else "store",
        )  # fmt: skip
    parser.add_argument("--config", default=None, metavar="FILE",
                        help="read options from this YAML file; the command line goes before it")  # fmt: skip
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)
    return parser


def _line(option: Option) -> str:
    """The help line: what it is, and the default where the words do not say it."""
    text = " ".join(option.help.split())
    shown = type(option.default) in (int, str, float) and option.default != ""
    if shown and str(option.default) not in text.split():
        text += f" (default: {option.default})"
    return text.replace("%", "%%")


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    if option.kind == Share:
        return "FRACTION"
    return _METAVARS.get(option.kind, option.name.upper())


def _option(field: dataclasses.Field[Any], hint: Any, words: str) -> Option:
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kind = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        kind = str
    elif kind != Share:
        kind = typing.get_origin(kind) or kind
    return Option(field.name, kind, default, words, choices, optional)


def _docstrings(command: type[Any]) -> dict[str, str]:
    """The string below each field of the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(command))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), (
                field.target.id
            )
            found[field.target.id] = str(text.value.value)
    return found


def _positional(command: type[Any]) -> tuple[str, ...]:
    """The options that may be given by place, in order."""
    return getattr(command, "PLACES", ())


def _place(name: str, command: type[Any], words: list[str], given: dict[str, Any]) -> None:
    """Put words without a flag where they belong; the last ones are the most needed."""
    places = _positional(command)
    if len(words) > len(places):
        raise UsageError(f"{words[len(places)]!r}: unexpected word; {_see(name)}")
    for place, word in zip(reversed(places), reversed(words), strict=False):
        if place in given:
            raise UsageError(f"give {place.upper()} by its place or as --{place}, not both")
        given[place] = word


def _file(name: str, path: str | None, options: dict[str, Option]) -> dict[str, Any]:
    """The options in a YAML file."""
    if path is None:
        return {}
    try:
        import yaml
    except ImportError:
        raise MissingExtra("PyYAML", "cli") from None
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"--config {path}: holds no options; write lines such as sparsity: 0.5")
    read = {}
    for key, value in found.items():
        word = str(key).replace("-", "_")
        if word == DEBUG.strip("-"):
            raise UsageError(f"{DEBUG} goes on the command line, not into a file of options")
        if word not in options:
            _refuse(name, f"--{key}", [option.flag for option in options.values()], f" in {path}")
        read[word] = value
    return read


def _refuse(name: str, word: str, known: list[str], where: str = "") -> NoReturn:
    near = difflib.get_close_matches(word.partition("=")[0], known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"unknown option {word}{where}{hint}; {_see(name)}")


def _see(name: str) -> str:
    return f"see gossamer {name} --help"


def _hyphens(word: str) -> str:
    """`--eval_data=x` as `--eval-data=x`."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if word.startswith("--") else name) + equals + value


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(value)


def _mapping(text: str) -> dict[str, Any]:
    """`every=50,drop=0.3`, or the same as JSON or YAML."""
    if not text.lstrip().startswith("{"):
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(text)
        return {key.strip(): _literal(value.strip()) for key, _, value in pairs}
    try:
        import yaml
    except ImportError:
        return dict(json.loads(text))
    try:
        return dict(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(text) from error


def _literal(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
