"""What fresh processes do with the folders: load, generate, export; then read without Gossamer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checks
import torch
from families import NEW_TOKENS, Family
from rows import Row, Wrong
from safetensors.torch import load_file, load_model
from torch import nn

EXPORT_GAP = 1e-5
DESCRIBED = (("transformers",), ("diffusers",))
"""What families whose folders say how to build them need."""


def load(row: Row, family: Family, folder: Path, name: str) -> None:
    """Load the packed folder, compare, generate; then export it."""
    import gossamer as gs

    described = family.needs in DESCRIBED
    others = {} if described else {"model": family.make(seed=1)}
    wanted, model = load_file(folder / "wanted.safetensors"), None
    with row.step(f"load {name}", too_late):
        model = gs.load(folder / "packed", latency="rule", **others)
        checks.gap(checks.run(model, family.data()), wanted, checks.LARGEST_GAP)
    if row.passed(f"load {name}") and family.decodes:
        generate(row, family, model, folder, name)
    if "transformers" in family.needs:
        with row.step(f"from_pretrained {name}", too_late):
            model = from_pretrained(type(family.build()), folder / "packed")
            checks.gap(checks.run(model.eval(), family.data()), wanted, checks.LARGEST_GAP)
    with row.step(f"export {name}", too_late):
        others = {} if described else {"model": family.make(seed=1)}
        gs.export(folder / "packed", folder / "plain", **others)


def too_late(_: str) -> None:
    """A refusal to read what `save` wrote without complaint is a fault, never an answer."""
    raise Wrong("the folder was written without complaint")


def generate(row: Row, family: Family, model: Any, folder: Path, name: str) -> None:
    """The tokens of the masked dense model, by transformers' loop and by Gossamer's."""
    import gossamer as gs

    wanted, given = load_file(folder / "tokens.safetensors")["ids"], family.prompt()
    with row.step(f"generate {name}"), torch.no_grad():
        found = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        equal(found, wanted)
    if given.keys() - {"input_ids", "attention_mask"}:
        return  # gs.generate takes token ids alone
    with row.step(f"gs.generate {name}"):
        end = getattr(model.generation_config, "eos_token_id", None)
        eos = {} if end is None else {"eos": end}
        equal(gs.generate(model, given["input_ids"], NEW_TOKENS, **eos), wanted)


def equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise Wrong unless the tokens are the same."""
    if found.tolist() != wanted.tolist():
        raise Wrong(f"tokens {found.tolist()[0]} instead of {wanted.tolist()[0]}")


def plain(row: Row, family: Family, folder: Path, name: str) -> None:
    """Read both folders as somebody without Gossamer does."""
    elsewhere(row, family, folder, name)
    if not row.passed(f"export {name}"):
        return
    with row.step(f"plain {name}"):
        model = family.make(seed=2)
        if family.needs in DESCRIBED:
            model = from_pretrained(type(model), folder / "plain")
        else:
            load_model(model, folder / "plain" / "model.safetensors")
        bits(model, load_file(folder / "state.safetensors"))
        wanted = load_file(folder / "wanted.safetensors")
        checks.gap(checks.run(model.eval(), family.data()), wanted, EXPORT_GAP)


def elsewhere(row: Row, family: Family, folder: Path, name: str) -> None:
    """Without Gossamer, transformers must not take the packed folder for random weights."""
    if "transformers" not in family.needs:
        return
    with row.step(f"elsewhere {name}"):
        kind: Any = type(family.build())
        try:
            kind.from_pretrained(folder / "packed", local_files_only=True)
        except Exception:
            return
        raise Wrong("transformers read the packed folder without Gossamer, as other weights")


def from_pretrained(kind: Any, folder: Path) -> nn.Module:
    """Transformers' own reading, with nothing missing and nothing too many."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if told.get(what):
            raise Wrong(f"{what}: {sorted(map(str, told[what]))[0]}")
    return model


def bits(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """Raise Wrong unless every weight has the bits of the masked dense model."""
    for key, value in model.state_dict().items():
        if key in wanted and not checks.same(value, wanted[key]):
            raise Wrong(f"{key} is not the masked dense weight")
