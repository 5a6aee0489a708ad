"""The examples of docstrings as data; run, it writes each as a script for the type checker."""

import ast
import doctest
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def examples() -> dict[str, str]:
    """The docstrings that hold examples, by path and name."""
    found = {}
    for path in sorted(SOURCE.glob("gossamer/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and ">>> " in text:
                    name = getattr(node, "name", "module")
                    found[f"{path.relative_to(SOURCE / 'gossamer')}:{name}"] = text
    return found


def write(folder: Path) -> None:
    """One script for each, with what it prints as comments."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    for name, text in examples().items():
        script = folder / (name.replace("/", "_").replace(".py:", "_") + ".py")
        script.write_text(doctest.script_from_examples(text))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
