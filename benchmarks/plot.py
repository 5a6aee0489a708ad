"""Draws docs/images/speed.png and roofline.png from benchmarks/results/*.json.

Needs matplotlib (pip install 'gossamer[plots]'). Run: python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLOURS = {"float32": "#2f6f8f", "bfloat16": "#c0653a", "int4": "#5d8a3a", "int8": "#7d5ba6"}
WIDTHS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
MARKS = {1: "o", 16: "s", 128: "^"}


def read(name: str) -> dict[str, object]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def speed() -> None:
    """Speed over the best dense engine against density, a panel for each batch size."""
    cases = [c for c in read("kernels")["cases"] if not c["case"].get("block")]
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    for panel, batch in zip(panels, (1, 16, 128)):
        shape = (4096, 11008) if batch == 1 else (4096, 4096)
        for dtype in ("float32", "bfloat16"):
            points = sorted(
                (c["case"]["density"], c["ratio"])
                for c in cases
                if (c["case"]["out"], c["case"]["inputs"]) == shape
                and (c["case"]["batch"], c["case"]["dtype"]) == (batch, dtype)
            )
            densities, ratios = zip(*points)
            panel.plot(densities, ratios, "o-", color=COLOURS[dtype], label=dtype, lw=1.8, ms=5)
        panel.axhline(1.0, color="#888", lw=1, ls="--")
        panel.annotate(
            "best dense engine",
            (0.03, 1.0),
            xycoords=("axes fraction", "data"),
            xytext=(0, -11),
            textcoords="offset points",
            fontsize=8,
            color="#666",
        )
        panel.set_ylim(bottom=0, top=panel.get_ylim()[1] * 1.05)
        panel.set_xlim(0, 0.55)
        panel.set_title(f"batch size {batch}, {shape[0]} x {shape[1]}", fontsize=10)
        panel.set_xlabel("density (fraction kept)")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("speed over the best dense engine")
    panels[0].legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(IMAGES / "speed.png", dpi=110)


def roofline() -> None:
    """Flops per second against flops per stored byte, under the machine's measured limits."""
    record = read("kernels")
    read_rate, peak = record["limits"]["read"], record["limits"]["flops"]
    figure, axis = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    knee = peak / read_rate
    low, high = 0.25, 1000
    axis.plot([low, knee, high], [low * read_rate / 1e9, peak / 1e9, peak / 1e9], color="#333")
    axis.text(
        0.6,
        0.6 * 1.25 * read_rate / 1e9,
        f"memory: {read_rate / 1e9:.0f} GB/s read",
        rotation=39,
        rotation_mode="anchor",
        fontsize=9,
    )
    axis.annotate(
        f"multiply-adds: {peak / 1e9:.0f} GFLOP/s float32",
        (high, peak / 1e9),
        xytext=(-4, 6),
        textcoords="offset points",
        fontsize=9,
        ha="right",
    )
    seen = set()
    for case in record["cases"]:
        facts = case["case"]
        if "x" in facts.get("block", "") or facts.get("form"):
            continue
        positions = facts["out"] * facts["inputs"]
        kept = facts["density"] * positions
        if case["limit"] == "bytes":  # of the form that served
            nbytes = case["fraction_of_limit"] * 1e-3 * case["milliseconds"]["gossamer"] * read_rate
        else:
            nbytes = kept * WIDTHS[facts["dtype"]] + (positions / 8 if facts["density"] < 1 else 0)
        flops = 2 * kept * facts["batch"]
        rate = flops / (1e-3 * case["milliseconds"]["gossamer"])
        label = (facts["dtype"], facts["batch"])
        axis.plot(
            flops / nbytes,
            rate / 1e9,
            MARKS[facts["batch"]],
            ls="",
            ms=6,
            alpha=0.85,
            color=COLOURS[facts["dtype"]],
            label=None if label in seen else f"{label[0]}, batch size {label[1]}",
        )
        seen.add(label)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(2, 600),
        xlabel="flops per stored byte of the weights",
        ylabel="GFLOP/s on the kept weights",
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(IMAGES / "roofline.png", dpi=110)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    speed()
    roofline()
