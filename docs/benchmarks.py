"""The page docs/guide/benchmarks.md, from benchmarks/results/*.json; `generate.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Case = dict[str, Any]

# Why targets were missed. Each text is followed by what missed its target for this reason.
LOADS = """**Large batches: loads, not multiply-adds.** A kept weight takes 5 loads for 4 vectors of
products. That is 3.4 cycles measured, where the products alone take 2. It is 2.6 where two rows
share the column, as half do at 50%.

Sums come on top. A block of 112 columns and a batch of 64 fills the first-level cache. So the sums
of four rows (32 lines in and out) come and go for every block, and the second level moves 0.65
lines per cycle here. At 95% sparsity that is 50 cycles, beside 75 for the 22 weights that the four
rows keep there. Blocks of 112 to 240 columns measured within 5% of each other at 95%.

Sums in the cache and inputs in registers take 6.7 cycles a weight instead, for their stores. A
batch of 128 at a time, which reads the weights once, gains 1%. Turning the inputs and results takes
0.3 ms of a call."""
BITMAPS = """**Batch size 1: instructions.** Each word of 64 positions is expanded, whatever it keeps. That
is 14 turns of one port: two masks loaded, 4 vectors widened, 4 expanded at 2 each. It takes 14.4
cycles measured in cache, and 80% sparsity would have to take 9.7 to stream at 0.85.

Lookup tables, compressing x instead and widening ahead were measured and are no faster. Two rows in
one stream of 32 bits need no widening and gain 3 to 10%, but would be one more form in memory.
At 50% the bytes alone would take 2.2 ms and the instructions alone 2.0, which overlap in part.

Below density 0.12 columns are read instead, at 1.4 cycles a weight: two loads and an insertion
each, since gather instructions take 2 here. Against a dense product that reads at full speed, half
of the weights in 0.56 of the bytes can gain 1.78."""
UNPACK = """**4 bits: counting.** It takes about 10 cycles for 64 columns to count where each kept integer
goes, without the byte-expand instructions of newer processors. Reading them takes 6. 2:4 needs no
counting but a table, and 4:8 two tables and a sum."""
PROMPTS = """**Prompts.** Products of a prompt are dense: weights are unpacked for them, so zeros save
nothing."""
CONV = """**Convolutions.** Not the 1x1 products alone count: the first and the depthwise convolutions
stay dense. One kept weight serves one output channel, where a dense kernel keeps a tile of outputs
in registers."""
CALLS = """**Active columns: calls.** A call costs 0.04 to 0.08 ms before the first line, which shows in
products of less than a millisecond. Lines of 4 or 8 KB each begin elsewhere in memory, where
prefetching starts anew. The same lines again, from the caches, take a fifth less. Huge pages were
measured and do not help."""
SORT = """**SpGEMM.** Sorting the columns of every row comes on top of the product."""


def read(name: str) -> dict[str, Any]:
    """One file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def cases(name: str, **wanted: Any) -> list[Case]:
    """The cases of a file whose description has these values."""
    chosen = read(name)["cases"]
    return [c for c in chosen if all(c["case"].get(k, "") == v for k, v in wanted.items())]


def best(case: Case) -> float:
    """Speed over the best dense engine."""
    return float(case["ratio"])


def over(engine: str) -> Callable[[Case], float]:
    """Speed over the fastest of the engines with this in their names."""

    def ratio(case: Case) -> float:
        times = case["milliseconds"]
        return min(t for name, t in times.items() if engine in name) / times["gossamer"]

    return ratio


def of_avx512(case: Case) -> float:
    """Speed of our kernels for processors without AVX-512 over that of those with it."""
    return float(case["milliseconds"]["gossamer"] / case["milliseconds"]["gossamer avx2"])


def of_limit(case: Case) -> float:
    """Fraction of the machine's limit."""
    return float(case["fraction_of_limit"])


def prompt(case: Case) -> float:
    """Speed of the prompt over llama.cpp's."""
    return float(case["prompt_ratio"])


Row = tuple[str, list[Case], Callable[[Case], float], float, str]


def targets() -> list[Row]:
    """What is measured, in which case, how, the target and what limits it."""
    square = {"out": 4096, "inputs": 4096, "block": ""}
    wide = {"out": 4096, "inputs": 11008, "batch": 1}
    rows: list[Row] = []
    for batch, wanted in (
        (128, {0.5: 1.8, 0.3: 2.5, 0.2: 3.5, 0.1: 6.0, 0.05: 10.0}),
        (16, {0.5: 1.8, 0.2: 3.0, 0.1: 5.0}),
    ):
        for density, target in wanted.items():
            found = cases("kernels", dtype="float32", batch=batch, density=density, **square)
            label = f"float32, batch size {batch}, {1 - density:.0%} sparsity, over the best dense"
            rows.append((label, found, best, target, LOADS))
    for case in cases("kernels", dtype="float32", batch=128, **square):
        if "gossamer avx2" in case["milliseconds"]:  # not on processors that have no more than it
            sparsity = 1 - case["case"]["density"]
            label = f"float32, batch size 128, {sparsity:.0%} sparsity, AVX2 alone over AVX-512"
            rows.append((label, [case], of_avx512, 0.5, LOADS))
    for density, target in {0.5: 1.3, 0.2: 3.0}.items():
        found = cases("kernels", dtype="bfloat16", batch=128, density=density, **square)
        label = (
            f"bfloat16, batch size 128, {1 - density:.0%} sparsity, over the best dense bfloat16"
        )
        rows.append((label, found, over("dense bfloat16"), target, LOADS))
    found = cases("kernels", block="16x1", density=0.3)
    rows.append(
        ("blocks 16x1, 70% sparsity, batch size 128, over the best dense", found, best, 2.5, LOADS)
    )
    for density in (0.5, 0.3, 0.2):
        found = cases("kernels", dtype="bfloat16", density=density, **wide)
        label = f"bfloat16, batch size 1, {1 - density:.0%} sparsity, of the read bandwidth"
        rows.append((label, found, of_limit, 0.85, BITMAPS))
    found = cases("kernels", dtype="bfloat16", density=0.5, **wide)
    rows.append(
        ("bfloat16, batch size 1, 50% sparsity, over the best dense", found, best, 1.7, BITMAPS)
    )
    for even in ("", "4:8", "2:4"):
        found = cases("kernels", dtype="int4", density=0.5, block=even, form="", **wide)
        how = f" as {even}" if even else ", held dense"
        label = f"4 bits, batch size 1, 50% sparsity{how}, over the best dense bfloat16"
        rows.append((label, found, over("dense bfloat16"), 3.5, UNPACK))
    for density, target in {0.1: 2.5, 0.05: 4.0}.items():
        label = f"training step of an MLP, {1 - density:.0%} sparsity, over dense autograd"
        rows.append((label, cases("training", density=density), best, target, LOADS))
    return rows + _other_targets()


def _other_targets() -> list[Row]:
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16", "int8"):
        found = [c for c in cases("active", dtype=dtype) if "columns" in c["case"]["name"]]
        for case in found:
            label = (
                f"active columns, {dtype}, {case['case']['zeros']:.0%} sparsity, of the byte bound"
            )
            rows.append((label, [case], of_limit, 0.8, CALLS))
    found = cases("conv", batch=1, channels=0)
    label = "MobileNet-v1 geometry, 1x1 convolutions 90% sparse, over torch"
    rows.append((label, found, over("torch dense"), 1.8, CONV))
    for case in cases("spgemm"):
        label = f"SpGEMM, {case['case']['name']}, over scipy"
        rows.append((label, [case], over("scipy"), 1.5, SORT))
    for dtype, target in {"bfloat16": 1.3, "int8": 1.5, "int4": 1.4}.items():
        for case in cases("decode", dtype=dtype):
            if (baseline := case["case"].get("baseline")) is None or case["case"]["density"] == 1.0:
                continue
            label = f"Llama of 1.1 billion, {dtype} + {_zeros(case)}, over {baseline}"
            rows.append((f"{label}, decoding", [case], best, target, UNPACK))
            rows.append((f"{label}, prompt of 256", [case], prompt, 1.0, PROMPTS))
    return rows


def page() -> str:
    """The whole page."""
    reached = ["| what | target | reached |", "|---|---|---|"]
    missed: dict[str, list[str]] = {}
    for label, found, value, target, reason in targets():
        assert found, f"no result for {label}"
        for case in found:
            figure = value(case)
            met = figure >= target
            cell = f"{figure:.2f}" if met else f"**{figure:.2f}**"
            reached.append(f"| {label} | {target:g} | {cell} |")
            if not met:
                missed.setdefault(reason, []).append(f"{label} ({figure:.2f} of {target:g})")
    why = "\n\n".join(
        "\n".join([reason, "", *(f"- missed: {label}" for label in labels)])
        for reason, labels in missed.items()
    )
    return _TEXT.format(
        processor=_processor(read("kernels")),
        limits=_limits(),
        reached="\n".join(reached),
        why=why,
        layers=_layers(),
        decode=_decode(),
    )


def _zeros(case: Case) -> str:
    pattern = case["case"]["pattern"]
    scattered = "50% sparsity, held dense" if case["case"]["dtype"] == "int4" else "50% sparsity"
    return {"dense": "dense", "2:4": "50% sparsity as 2:4"}.get(pattern, scattered)


def _processor(record: dict[str, Any]) -> str:
    """Which one made a record; records that do not say were made on the first machine."""
    if (machine := record.get("machine")) is None:
        return "a Cascade Lake Xeon without bfloat16 instructions"
    dots = {True: ", with", False: ", without"}.get(machine.get("bfloat16_dot"))
    return machine["cpu"] + (f"{dots} bfloat16 instructions" if dots else "")


def _limits() -> str:
    record = read("kernels")
    limits = record["limits"]
    return (
        f"{limits['threads']} threads and torch {record['versions']['torch']}. It reads "
        f"{limits['read'] / 1e9:.1f} GB/s and does {limits['flops'] / 1e9:.0f} GFLOP/s of float32 "
        f"multiply-adds. Kernels: {record['kernels']}"
    )


def _layers() -> str:
    lines = ["| layer | dtype | batch size | density | ours | best dense | speed | of the limit |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for case in read("kernels")["cases"]:
        facts, times = case["case"], case["milliseconds"]
        block = f", {facts['block']}" if facts.get("block") else ""
        block += ", held sparse" if facts.get("form") else ""
        baseline = (
            f"{times[case['best_dense']]:.2f} ms ({case['best_dense'].replace(' dense', '')})"
        )
        lines.append(
            f"| {facts['out']} x {facts['inputs']} | {facts['dtype']}{block} | "
            f"{facts['batch']} | {facts['density']:g} | {times['gossamer']:.2f} ms | {baseline} | "
            f"{case['ratio']:.2f}x | {case['fraction_of_limit']:.2f} of {case['limit']} |"
        )
    return "\n".join(lines)


def _decode() -> str:
    lines = ["| ours | against | ours, tokens/s | its | decoding | prompt of 256 |"]
    lines.append("|---|---|---|---|---|---|")
    for case in read("decode")["cases"]:
        if (baseline := case["case"].get("baseline")) is None:
            continue
        times = case["tokens_per_second"]
        lines.append(
            f"| {case['case']['dtype']}, {_zeros(case)} | {baseline} | {times['gossamer']:.1f} | {times[baseline]:.1f} | "
            f"{case['ratio']:.2f}x | {case['prompt_ratio']:.2f}x |"
        )
    return "\n".join(lines)


_TEXT = """# Benchmarks

The tables are written from `benchmarks/results/*.json` by `make docs`, and the pictures by `python benchmarks/plot.py`. Measured by `gossamer bench` on {processor}, with {limits}. Every result is checked before it is timed. Engines take turns in one process, and medians count.

![Speed over the best dense engine against density](../images/speed.png)

The best dense engine is the fastest of torch in float32 and bfloat16, numpy and onnxruntime, case by case. At batch size 1 a dense bfloat16 product of our own counts too. For integers the 8- and 4-bit engines of torch and onnxruntime count as well, so 8 bits of ours may meet 4 of theirs. Our dense product reads about as fast as memory allows, which torch's does not. The layer table names who was fastest.

![Our kernels under the machine's measured limits](../images/roofline.png)

Points below the slope of batch size 1 wait for instructions. Points below the roof wait for loads from the caches.

## Targets

{reached}

## What limits the ones that were missed

{why}

## A whole model against llama.cpp

Random weights in the geometry of a Llama of 1.1 billion parameters, one process, batch size 1: `gossamer bench --suite decode --geometry llama-1b --json`. At 4 bits unstructured zeros make the file smaller, not the product faster. Finding where each kept integer goes takes longer here than reading a dense one. So in memory such layers hold dense integers, zeros among them. The table of layers has the kernel that they would have held sparse.

{decode}

## Layers

{layers}

## Choosing by measured latencies

`gossamer calibrate` times every kernel on a few layers of this machine. It fits what a call, the vectors, all positions and the kept weights cost, and keeps the result in the user's cache folder. `gs.compress`, `gs.load` and `gossamer compress` use it where it is there. Each layer gets the kernel that is predicted to be fastest, or stays dense where none wins, and its record has the predictions. Models that generate text are judged at batch size 1, others at 128.

Without it short timings decide, and records say so. Measure on an idle machine: whatever else runs is measured too.

Files hold the smallest form, and memory may hold a faster one. Batch size 1 takes the bitmap, or the columns where few weights are kept (2 bytes more for each). Unstructured 4-bit integers are dense. Larger batches have the forms of [the table above](#layers). Records, and `rows_decided`, `form_decided` and `large_batches_decided` of a layer, say which and why.
"""
