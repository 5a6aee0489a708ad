"""What a result says in sentences, the same for terminal and page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gossamer.report.tables import WIDE, gain, human

_SHOWN = 4
"""Groups that are named one by one."""


def title(result: Mapping[str, Any]) -> str:
    """The model, the method, the pattern and the sparsity."""
    sparsity = f"{1 - result['measured_density']:.1%} sparsity"
    bits = f", {result['bits']} bits" if result.get("bits") else ""
    model = f"{result['model']}: " if result.get("model") else ""
    chosen = result.get("activations")
    if chosen and result["measured_density"] >= 1:
        return f"{model}{chosen['method']}{bits}"
    told = f"{model}{result['method']}, {result['pattern']}, {sparsity}{bits}"
    return f"{told}, {chosen['method']}" if chosen else told


def notes(result: Mapping[str, Any]) -> list[str]:
    """Sentences on coverage, layers that run dense, speed and dtypes."""
    lines = coverage_notes((result.get("coverage") or {}).get("pruned") or {})
    lines += layer_notes(result["layers"])
    if chosen := result.get("activations"):
        lines.append(
            f"Each new token is to read {chosen['density']:.1%} of the weights of layers that choose "
            "their inputs; the quality is that of a text in which every token chooses."
        )
    lines += speed_notes(result["speed"])
    if result.get("source") and result.get("dtype") not in (None, result["source"]):
        lines.append(
            f"The source holds {result['source']}; weights are stored as {result['dtype']}, and "
            f"ratios are to a dense model in {result['dtype']} (--dtype {result['source']} keeps it)."
        )
    return lines + kernel_notes(result)


def kernel_notes(result: Mapping[str, Any]) -> list[str]:
    """What chose the kernels, and what to do where the result is slower."""
    served = [layer for layer in result["layers"] if layer["kernel"]]
    lines = []
    told = " ".join(str(layer.get("decided") or layer.get("reason")) for layer in result["layers"])
    if "timed here" in told:
        lines.append(
            "Kernels are chosen by short timings on this machine. After gossamer calibrate, once on "
            "an idle machine, they go by thorough ones."
        )
    elif any(layer.get("predicted") for layer in result["layers"]):
        lines.append("Kernels are chosen by latencies measured on this machine.")
    elif any(layer.get("decided") == "by rule" for layer in served):
        lines.append(
            "Kernels are chosen by rule. After gossamer calibrate, once on an idle machine, each "
            "layer gets what is fastest there, sparse or dense."
        )
    speed = result["speed"]
    if served and gain(speed) < 1 - WIDE and not speed.get("disturbed"):
        lines.append("Sparsity makes this model slower here: fewer bytes, but no faster product.")
    return lines


def coverage_notes(coverage: Mapping[str, Any]) -> list[str]:
    """How much of a model was pruned, and what was left alone, of a `Coverage` as a mapping."""
    if not coverage.get("matrices"):
        return []
    pruned, matrices, total = (coverage[name] for name in ("pruned", "matrices", "total"))
    lines = [
        f"Pruned {pruned / matrices:.1%} of the model's matrix weights ({human(pruned)} of "
        f"{human(matrices)}); {1 - coverage['nonzero'] / total:.1%} of all its weights are zero."
    ]
    groups = left_out_groups(coverage["left_out"])
    if groups:
        named = "; ".join(
            f"{name} ({human(count)}{f', {many} of them' if many > 1 else ''}, {kind}: {reason})"
            for name, kind, reason, many, count in groups[:_SHOWN]
        )
        rest = sum(count for *_, count in groups[_SHOWN:])
        hidden = len(groups) - _SHOWN
        more = f"; {hidden} more kind{'s' * (hidden > 1)} ({human(rest)})" if rest else ""
        lines.append(f"Left alone: {named}{more}.")
    return lines


def left_out_groups(
    left_out: Iterable[Mapping[str, Any]],
) -> list[tuple[str, str, str, int, int]]:
    """(name, kind, reason, how many, weights) with numbers in names as *, the largest first."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    once = {each["name"]: each for each in reversed(list(left_out))}  # shared ones have two reasons
    for each in reversed(once.values()):
        key = (starred(each["name"]), each["kind"], each["reason"])
        groups.setdefault(key, []).append(each["count"])
    found = [(*key, len(counts), sum(counts)) for key, counts in groups.items()]
    return sorted(found, key=lambda one: -one[4])


def layer_notes(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many layers run sparse, and why the others do not, each reason once."""
    dense = [layer for layer in layers if not layer["kernel"]]
    lines = [f"{len(layers) - len(dense)} of {len(layers)} layers run sparse."]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in dense:
        groups.setdefault(re.sub(r"\d[\d.]*", "#", layer["reason"] or ""), []).append(layer)
    for group in sorted(groups.values(), key=len, reverse=True):
        names = list(dict.fromkeys(starred(layer["name"]) for layer in group))
        listed = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        such = "such as " if len({layer["reason"] for layer in group}) > 1 else ""
        run = "layer runs" if len(group) == 1 else "layers run"
        lines.append(f"{len(group)} {run} dense: {such}{group[0]['reason']} ({listed}).")
    return lines


def speed_notes(speed: Mapping[str, Any]) -> list[str]:
    """How the speed was measured, and how far it can be trusted."""
    how = f"both models in turns in one process, median of {speed['repeats']} rounds"
    if speed["unit"] != "tokens/s":
        lines = [f"Speed: {how}."]
    else:
        lines = [f"Speed: greedy decoding, batch 1; {how}; the prompt is not timed."]
    if speed.get("dense_compiled"):
        lines.append(
            "From sparsity alone: both models in Gossamer's compiled loop. From sparsity and loop: the dense "
            "model in plain transformers."
        )
    if speed.get("disturbed"):
        lines.append(
            f"Machine busy: {speed['disturbed']} of {speed['repeats']} rounds were disturbed, so the "
            "speeds are rough; measure again on an idle machine."
        )
    return lines


def starred(name: str) -> str:
    """A layer's name with * for the numbers of its blocks: `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<![^.])\d+(?=\.)|(?<=\.)\d+$", "*", name)
