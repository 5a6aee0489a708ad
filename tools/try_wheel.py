"""Use an installed Gossamer as a user would: no checkout, no compiler, no extras.

Run by `wheel.py` inside the environment that it made, which is all that is on the PATH.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "ninja")


def main() -> None:
    """Prune, pack, save and load a small network, and ask the command line for what it answers."""
    found = [name for name in COMPILERS if shutil.which(name)]
    assert not found, f"compilers are in reach: {found}"
    for words in (
        ["--help"],
        ["--version"],
        ["methods"],
        ["methods", "wanda"],
        ["compress", "--help"],
    ):
        assert command(*words).strip(), words
    with tempfile.TemporaryDirectory() as folder:
        python(Path(folder) / "small")
        assert "density" in command("inspect", str(Path(folder) / "small"))


def command(*words: str) -> str:
    """What `gossamer WORDS` prints."""
    gossamer = Path(sys.executable).parent / "gossamer"
    done = subprocess.run([gossamer, *words], capture_output=True, text=True)
    assert done.returncode == 0, f"gossamer {' '.join(words)}: {done.stderr}"
    return done.stdout


def python(folder: Path) -> None:
    """The library itself: every step, and the same outputs after loading."""
    import torch
    from torch import nn

    import gossamer as gs
    from gossamer.ops import _dispatch

    assert "site-packages" in gs.__file__, gs.__file__
    kernels = _dispatch.describe()
    assert not kernels.startswith("reference"), kernels

    torch.manual_seed(0)
    model = network(nn)
    fast = gs.compress(gs.prune(model, "magnitude", sparsity=0.9), latency="rule")
    assert any(layer.kernel for layer in fast.layers), fast
    x = torch.randn(4, 256)
    expected = fast.model(x)
    gs.save(fast, folder)
    loaded = gs.load(folder, model=network(nn), latency="rule")
    torch.testing.assert_close(loaded(x), expected)
    print(f"tried gossamer {gs.__version__}: Python {platform.python_version()}, "
          f"torch {torch.__version__}, {kernels}")  # fmt: skip


def network(nn):
    """A perceptron large enough for a kernel."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval()


if __name__ == "__main__":
    main()
