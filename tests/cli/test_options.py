"""Help that explains every option, words by place, near misses, and a quick start."""

import dataclasses
import logging
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from typing import Literal

import pytest

import gossamer as gs
from gossamer.cli import COMMANDS, command, main
from gossamer.cli.options import Share, options_of, parse
from gossamer.core.allocation import ALLOCATIONS


@dataclass
class Toy:
    """Do something.

    Example: gossamer toy A B
    """

    PLACES = ("first", "second")

    second: str
    """the one that is needed"""
    first: str = "one"
    """the one that is not"""
    share: Share | None = None
    """such as 50%"""
    count: int = 3
    """how many"""
    kind: Literal["sum", "mean"] = "sum"
    """of what"""
    names: list[str] = field(default_factory=list)
    """some"""
    options: dict[str, typing.Any] = field(default_factory=dict)
    """more"""
    json: bool = False
    """flag"""

    def run(self):
        """Nothing."""


def toy(*words):
    return parse("toy", Toy, words)


def test_words_by_place_fill_the_needed_option_first():
    assert (toy("b").first, toy("b").second) == ("one", "b")
    assert (toy("a", "b").first, toy("a", "b").second) == ("a", "b")
    mixed = toy("a", "--count", "5", "b", "--json")
    assert (mixed.first, mixed.second, mixed.count, mixed.json) == ("a", "b", 5, True)
    assert toy("--second=b").second == "b"


def test_values_are_read_by_their_kind():
    assert toy("b", "--share", "30%").share == 0.3 and toy("b", "--share=0.3").share == 0.3
    assert toy("b", "--names", "x,y", "--names=z").names == ["x", "y", "z"]
    assert toy("b", "--options=every=50,drop=0.3,on=true,mode=fast").options == {
        "every": 50, "drop": 0.3, "on": True, "mode": "fast",
    }  # fmt: skip
    assert toy("b", "--options={every: 50}").options == {"every": 50}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "SECOND is missing: gossamer toy SECOND"),
        (("a", "b", "c"), "'c': unexpected word"),
        (("b", "--second=b"), "not both"),
        (("b", "--cuont=3"), "did you mean --count?"),
        (("b", "--count=3.5"), "--count takes a whole number, not '3.5'"),
        (("b", "--count"), "--count: expected one argument; see gossamer toy --help"),
        (("b", "--kind=maen"), "one of sum, mean, not 'maen' (did you mean mean?)"),
        (("b", "--share=half"), "a fraction such as 0.5 or 50%"),
        (("b", "--options=every"), "every=50"),
        (("b", "--json=yes"), "--json: takes no value, not 'yes'"),
        (("b", "--xyz"), "unknown option --xyz; see gossamer toy --help"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(words, says):
    with pytest.raises(gs.UsageError) as caught:
        toy(*words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_options_stands_behind_the_command_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("second: b\ncount: 7\nshare: 20%\nnames: [x, y]\njson: true\nkind: mean\n")
    found = toy(f"--config={file}", "--count=9")
    assert found == Toy("b", share=0.2, count=9, names=["x", "y"], json=True, kind="mean")
    for text, says in [
        ("cuont: 3", "--cuont in"), ("json: maybe", "--json"), ("kind: x", "one of sum, mean"),
        ("- 1", "no options"), ("a: [", "cannot be read"), ("debug: true", "command line"),
    ]:  # fmt: skip
        file.write_text(text)
        with pytest.raises(gs.UsageError, match=says):
            toy(f"--config={file}", "b")
    with pytest.raises(gs.UsageError, match="cannot be read"):
        toy("--config=missing.yaml", "b")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_explains_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    assert caught.value.code in (None, 0) and max(map(len, shown.splitlines())) <= 100
    for option in options_of(command(name)):
        assert option.flag in shown and len(option.help.split()) > 2, option.name
        assert " ".join(option.help.split()) in flat, option.name
        if option.choices:
            assert "{" + ",".join(option.choices) + "}" in shown
        if type(option.default) in (int, float):
            assert str(option.default) in flat
    assert "Example: gossamer" in shown and f"gossamer {name}" in shown


def test_choices_are_those_of_the_library():
    found = {option.name: option for option in options_of(command("compress"))}
    assert set(found["allocation"].choices) == set(ALLOCATIONS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_defaults_are_those_of_the_dataclass(name):
    kind = command(name)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING
              and f.default_factory is dataclasses.MISSING]  # fmt: skip
    assert parse(name, kind, [f"--{x}=here" for x in needed]) == kind(
        **dict.fromkeys(needed, "here")
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["comprss"], "unknown command 'comprss' (did you mean compress?); see gossamer --help"),
        (["--hlep"], "unknown option '--hlep'"),
        (["bench", "--geometry=foo"], "llama-1b"),
        (["bench", "--only=nothing of this name"], "leaves no case"),
    ],
)
def test_mistyped_words(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["comprss"], []])
def test_the_first_words_need_no_torch(words):
    ours = [sys.executable, "-X", "importtime", "-m", "gossamer", *words]
    done = subprocess.run(ours, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gossamer.cli" in modules and not {"torch", "numpy", "rich", "yaml"} & modules
    if words == ["--version"]:
        assert done.stdout.strip() == f"gossamer {gs.__version__}"


def test_every_name_is_there_however_the_process_started():
    code = (
        "import sys; sys.argv = ['/usr/bin/gossamer']; import gossamer; "
        "assert 'torch' not in sys.modules; assert gossamer.prune and gossamer.weights.SparseGPT; "
        "assert 'prune' in gossamer.__all__; assert gossamer.io.save; assert not hasattr(gossamer, 'nonsense')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import gossamer; assert 'weights' in dir(gossamer); from gossamer import *; prune, FormatError"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_log_is_left_as_it_was(capsys):
    log = logging.getLogger("gossamer")
    before = (list(log.handlers), log.level, log.propagate)
    with pytest.raises(SystemExit):
        main(["inspect", "missing"])
    assert (list(log.handlers), log.level, log.propagate) == before
    assert not log.handlers  # so that Python itself shows warnings where nobody configured logging


def test_an_interrupted_command_promises_only_what_it_keeps(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command("compress"), "_check", stop)
    out = f"--out={tmp_path / 'out'}"
    with pytest.raises(SystemExit) as caught:
        main(["compress", out])
    assert caught.value.code == 130 and "resumes" not in capsys.readouterr().err
    (tmp_path / ".out.journal").mkdir()
    with pytest.raises(SystemExit):
        main(["compress", out])
    assert capsys.readouterr().err.strip().endswith("the same command resumes the run")
