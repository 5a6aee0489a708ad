"""The generated pages are current, and what the README and the guide name exists."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

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


def test_the_own_model_page_runs(tiny_llama, tmp_path, monkeypatch):
    text = (ROOT / "docs/guide/own-model.md").read_text()
    load, *blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7 and "AutoTokenizer.from_pretrained(name)" in load
    notes = "".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(400))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(notes)
    (tmp_path / "held_out.txt").write_text(notes[:2000])
    names = {"model": tiny_llama(), "tokenizer": Bytes()}
    exec("\n".join(blocks), names)
    assert names["result"].measured_density == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "small-dense" / "config.json").is_file()


class Bytes:
    """A tokenizer whose tokens are bytes, with what the page calls."""

    def __call__(self, text, return_tensors=None):
        ids = list(text.encode())
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids):
        return bytes(ids.tolist()).decode("utf-8", "replace")

    def save_pretrained(self, folder):
        pass


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    sentences = [
        s for line in lines if not line.startswith(("|", "`", " ")) for s in line.split(". ")
    ]
    assert len(lines) < 110 and max(len(s.split()) for s in sentences) < 25


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/guide/index.md",
        "docs/guide/own-model.md",
        "docs/guide/lm-eval.md",
        "docs/guide/results.md",
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


def test_contributing_quotes_classes_as_they_are():
    def lines(text):  # of any indentation: ruff formats the blocks of this page
        return "\n".join(line.strip() for line in text.split("\n") if line.strip())

    files = sorted((ROOT / "src/gossamer/methods").rglob("*.py"))
    source = "\n".join(lines(path.read_text()) for path in files)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        assert lines(block) in source, block
