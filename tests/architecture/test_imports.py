"""Imports point downward only, importing does nothing, and hooks live in one file."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gossamer

ROOT = Path(gossamer.__file__).parent
ALLOWED = {
    "core": set(),
    "ops": {"core"},
    "nn": {"core", "ops"},
    "models": {"core", "ops"},
    "io": {"core", "ops", "nn"},
    "methods": {"core", "ops", "nn"},
    "engine": {"core", "ops", "nn", "models"},
    "integrations": {"core", "engine", "io", "nn"},
    "report": {"core"},
    "testbed": {"core", "ops", "nn", "models", "io"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    parts = path.relative_to(ROOT).parts
    layer = parts[0]
    if layer not in ALLOWED:
        return
    for name in imports(path):
        words = name.split(".")
        if words[0] != "gossamer" or len(words) < 2:
            continue
        assert words[1] == layer or words[1] in ALLOWED[layer], f"{path.name} imports {name}"
        if layer == "methods" and len(parts) > 2 and words[1] == "methods" and len(words) > 2:
            assert words[2] == parts[1], f"{path.name} imports a sibling kind: {name}"


WINGS = {"prune": set(), "train": set(), "inputs": set(), "serve": set(), "measure": {"serve"}}
"""Which other wings of the engine each may import."""


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parts[-3] == "engine"], ids=lambda p: p.stem
)
def test_wings_of_the_engine_stand_on_common_ground(path):
    wing = path.parts[-2]
    for name in imports(path):
        words = name.split(".")
        if words[:2] == ["gossamer", "engine"] and len(words) > 2 and words[2] in WINGS:
            assert words[2] in {wing} | WINGS[wing], f"{path.name} imports {name}"


def test_nothing_below_imports_the_top():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] not in ("cli", "bench", "__main__.py"):
            assert "gossamer" not in set(imports(path)), path


def length(node):
    """Lines of a function without its docstring."""
    whole = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        whole -= first.end_lineno - first.lineno + 1
    return whole


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node) <= 60, f"{node.name} in {path.name}"


def test_hooks_live_in_one_file():
    for path in FILES:
        if path.relative_to(ROOT).as_posix() != "engine/hooks.py":
            assert "register_forward" not in path.read_text(), path


def test_import_is_inert():
    code = (
        "import sys, torch; threads = torch.get_num_threads(); state = torch.get_rng_state();"
        "import gossamer;"
        "heavy = {'transformers', 'rich', 'yaml', 'sklearn', 'scipy', 'lightning', 'peft',"
        "'tensorboard'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "assert not torch.cuda.is_initialized();"
        "assert torch.get_num_threads() == threads;"
        "assert torch.equal(torch.get_rng_state(), state)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_public_names_exist_and_are_documented():
    for name in gossamer.__all__:
        assert getattr(gossamer, name).__doc__, name


def test_no_pickle_anywhere():
    for path in FILES:
        if "testbed" in path.parts:
            continue
        for name in imports(path):
            assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle"}, path
        assert "torch.load(" not in path.read_text(), path


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert gossamer.__version__ == project["version"]
