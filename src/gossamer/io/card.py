"""README.md of a saved model, as the Hub shows it: what was done, how dense it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from gossamer.core.errors import FormatError, MissingExtra
from gossamer.io.load import verify

README = "README.md"


def model_card(
    manifest: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str
) -> str:
    """The card of a model of transformers, by its manifest and the shapes of what is not packed.

    Densities are counted from what the folder holds; all else stands there as it was given.
    """
    layers, stored = manifest["layers"], manifest["stored"]
    weights = sum(prod(layer["shape"]) for layer in layers.values())
    kept = sum(layer["nnz"] for layer in layers.values())
    dense = sum(prod(shape) for key, shape in shapes.items() if key not in stored)
    total = weights + dense + sum(prod(entry["shape"]) for entry in stored.values())
    nonzero = kept + dense + sum(entry["nnz"] for entry in stored.values())
    patterns = sorted({layer["pattern"] for layer in layers.values()} - {""})
    lines = [
        "---", "library_name: transformers", "tags:", "- gossamer", "- sparse", "---", "",
        f"# {name}, made sparse by Gossamer", "", "| | |", "|---|---|",
        f"| Method | {manifest['method'] or 'not recorded'} |",
        f"| Pattern | {', '.join(patterns) or 'unstructured'} |",
        f"| Whole model | {nonzero:,} of {total:,} weights stored ({nonzero / total:.1%}) |",
    ]  # fmt: skip
    if layers:
        lines.append(f"| Packed layers | {len(layers)}, density {kept / max(1, weights):.3f} |")
    lines += [f"| {_cell(k)} | {_cell(v)} |" for k, v in manifest["provenance"].items() if _told(v)]
    lines += [
        "", "```python", "import gossamer as gs", "", 'model = gs.load("this folder")', "```", "",
        "After `import gossamer` the `from_pretrained` of transformers loads it too. "
        '`gs.export("this folder", "dense")` writes an ordinary checkpoint with zeros in it.', "",
    ]  # fmt: skip
    return "\n".join(lines)


def _told(value: Any) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 80


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def push(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload a folder that `save` wrote to the Hugging Face Hub; returns the address.

    Parameters
    ----------
    folder : path
        Verified before anything is sent.
    repo_id : str
        Such as `"name/repository"`. It is made where it does not exist.
    private : bool
        Whether a new repository is private.
    token : str, optional
        Of the Hub. By default what huggingface_hub finds.

    Raises
    ------
    FormatError
        Where a file is not as it was written.
    MissingExtra
        Without huggingface_hub.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "hf") from None
    if problems := verify(folder):
        raise FormatError("; ".join(problems))
    api = huggingface_hub.HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), commit_message="Sparse model, packed by Gossamer"
    )
    return str(address)
