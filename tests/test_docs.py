"""The generated pages are current, and what the README and the guide name exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from gossamer.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def test_method_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, text in generate.pages().items():
        assert (ROOT / "docs" / "methods" / name).read_text() == text, "run make docs"
    assert generate.VERDICTS.read_text() == generate.verdicts(), "run make docs"
    assert generate.BENCHMARKS.read_text() == generate.benchmarks(), "run make docs"


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/guide/index.md",
        "docs/guide/benchmarks.md",
        "docs/guide/training.md",
        "docs/guide/train-command.md",
        "docs/guide/ranks-and-trainers.md",
        "CONTRIBUTING.md",
    ],
)
def test_links_and_commands_exist(path):
    file = ROOT / path
    text = file.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (file.parent / target).exists(), target
    for command in re.findall(r"^\s*gossamer (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, command
