"""Build the wheels into dist/ and try each in a fresh environment. `make wheel` runs it.

nanobind's stable ABI begins with Python 3.12: one wheel (cp312-abi3) serves that version and all
later ones. Python 3.11 gets a wheel of its own. What the running interpreter cannot build is built
by the first other one found here; where there is none, that is said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STABLE = (3, 12)


def main() -> None:
    """Build for this interpreter and for one with the stable ABI; then try what was built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to write")
    parser.add_argument("--no-try", action="store_true", help="only build")
    options = parser.parse_args()
    pythons = [sys.executable]
    if sys.version_info < STABLE:
        if newer := stable_python():
            pythons.append(newer)
        else:
            print("no Python from 3.12 on was found, so no stable-ABI wheel is built: run again with "
                  "make wheel PYTHON=/path/to/python3.12", file=sys.stderr)  # fmt: skip
    for python in pythons:
        wheel = build(python, options.out)
        check(wheel)
        print(f"built {wheel}", flush=True)
        if not options.no_try:
            attempt(python, wheel)


def stable_python() -> str | None:
    """The first interpreter on the PATH, or of pyenv, that can build for the stable ABI."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = [shutil.which(f"python3.{minor}") for minor in range(STABLE[1], 20)]
    for python in [*filter(None, named), *sorted(map(str, versions.glob("3.*/bin/python3")))]:
        code = f"import sys, pip; sys.exit(sys.version_info < {STABLE})"
        if subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
            return python
    return None


def build(python: str, out: Path) -> Path:
    """Build one wheel; pip brings the build tools into an environment of their own."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", folder, str(ROOT))
        (built,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(built, out / built.name))


def check(wheel: Path) -> None:
    """Refuse a wheel whose tag promises more than its binary, or that lacks the licence."""
    names = zipfile.ZipFile(wheel).namelist()
    suffix = ".abi3.so" if "-abi3-" in wheel.name else ".so"
    if not any(Path(name).match(f"gossamer/_kernels*{suffix}") for name in names):
        raise SystemExit(f"{wheel.name} holds no gossamer/_kernels*{suffix}")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        raise SystemExit(f"{wheel.name} holds no LICENSE")


def attempt(python: str, wheel: Path) -> None:
    """Install the wheel into a fresh environment and use it there with no compiler in reach."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        bin = Path(folder) / "bin"
        # The pinned torch is the one that is tested; its CPU build exists where the pin says so.
        run(str(bin / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check",
            "-c", str(ROOT / "constraints.txt"), str(wheel.resolve()))  # fmt: skip
        quiet = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
        script = shutil.copy(ROOT / "tools" / "try_wheel.py", folder)
        run(str(bin / "python"), "-I", script, env=quiet | {"PATH": str(bin)}, cwd=folder)


def run(*command: str, **options: object) -> None:
    """Run a command; its failure is ours."""
    done = subprocess.run(command, **options)
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {' '.join(command)}")


if __name__ == "__main__":
    main()
