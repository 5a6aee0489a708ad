"""gossamer bench."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gossamer.bench import (
    active,
    attention,
    conv,
    decode,
    frontier,
    kernels,
    llama_cpp,
    nm,
    spgemm,
    training,
)
from gossamer.bench.measure import Limits, Repeats, measure_limits, when_calm
from gossamer.cli.output import note, print_json, print_table
from gossamer.core.errors import UsageError
from gossamer.core.files import cache_folder, write_whole
from gossamer.nn.kernel_choice.machine import machine
from gossamer.nn.kernel_choice.timing import CALM
from gossamer.ops import _dispatch

_POINTS = ".points.json"
"""The ending of the file beside --out that keeps the prompts of --suite frontier."""
Timed = Callable[[], dict[str, Any]]
_SUITES: dict[str, Any] = {
    "kernels": kernels, "active": active, "nm": nm, "spgemm": spgemm, "conv": conv,
    "training": training, "attention": attention,
}  # fmt: skip


@dataclass
class Bench:
    """Check the kernels, then time them against the engines installed here.

    Example: gossamer bench --suite kernels --json
    """

    suite: Literal[
        "kernels", "decode", "active", "nm", "spgemm", "conv", "training", "attention", "frontier"
    ] = "kernels"
    """kernels: single layers; decode: a whole model's decoding loop; active: inputs with zeros;
    nm: N:M weights; spgemm: sparse times sparse; conv: MobileNet-v1's geometry and 3x3 layers;
    training: steps of an MLP; attention: chosen tiles of 16k tokens, and decoding over 32k keys;
    frontier: scores on long prompts against the cost of attention, by method and density"""
    geometry: Literal["llama-1b", "llama-160m"] = "llama-1b"
    """of --suite decode: the shape of the model; its weights are random"""
    work: str = ""
    """of --suite decode: where the models for llama.cpp are written and found again (for llama-1b
    7 GB); the user's cache folder unless named"""
    only: str = ""
    """of all suites but decode: only cases whose description holds this text, such as 'batch 128'"""
    repeats: int = 7
    """turns that each engine takes; the median counts"""
    patience: float = 30.0
    """seconds per case to wait for a machine that nobody else uses; 0 measures at once"""
    out: str = ""
    """also write the JSON to this file, after every case"""
    resume: bool = False
    """keep the cases that --out holds already, of an earlier run, and add others; cases that were
    disturbed are measured again, and the calmer of both counts"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        """Measure, print, and write if asked."""
        if self.repeats < 1:
            raise UsageError(f"--repeats is at least 1, not {self.repeats}")
        if not 0 <= self.patience < float("inf"):
            raise UsageError(f"--patience is in seconds, 0 or more, not {self.patience}")
        if self.suite == "frontier":
            self._frontier()
            return
        self._chosen()
        earlier = self._earlier()
        limits = measure_limits(patience=self.patience)
        note(f"limits: {limits.read / 1e9:.1f} GB/s read, {limits.flops / 1e9:.0f} GFLOP/s float32")
        record = earlier or self._start(limits)
        _improve(record, limits)
        limits = Limits(**record["limits"])
        found = {one["label"]: one for one in record["cases"]}
        for index, (label, timed) in enumerate(wanted := self._wanted(limits), 1):
            if label in found and not _disturbed(found[label]):
                continue
            note(f"{index} of {len(wanted)}: {label}")
            again = {"label": label, **timed()}
            if label not in found or again.get("calm", 0.0) > found[label]["calm"]:
                found[label] = again
            record["cases"] = list(found.values())
            if self.out:
                write_whole(Path(self.out), functools.partial(_write, record))
        order = {label: index for index, (label, _) in enumerate(wanted)}
        record["cases"].sort(key=lambda case: order.get(case["label"], len(order)))
        _improve(record, measure_limits())
        if self.out:
            write_whole(Path(self.out), functools.partial(_write, record))
        if self.json:
            print_json(record)
        else:
            self._print(record["cases"])

    def _frontier(self) -> None:
        """Prompts that were read are kept beside --out until all are; a picture lies there too."""
        out = Path(self.out) if self.out else None
        keep = None if out is None else out.with_suffix(_POINTS)
        if keep is not None and not self.resume:
            keep.unlink(missing_ok=True)
        found = frontier.measure(self.only, keep)
        record = {"suite": self.suite, **_here(), "threads": torch.get_num_threads(),
                  **frontier.record(found)}  # fmt: skip
        if out is not None:
            write_whole(out, functools.partial(_write, record))
            found.save(out.with_suffix(".svg"))
        if self.json:
            print_json(record)
        else:
            header = ("task", "method", *(f"at density {x:g}" for x in frontier.DENSITIES))
            print_table("gossamer bench --suite frontier", header, list(frontier.table(found)))

    def again(self) -> str:
        """What a second call makes of an interrupted one."""
        places = [Path(self.out), Path(self.out).with_suffix(_POINTS)] if self.out else []
        kept = any(place.is_file() for place in places)
        return "; finished cases are kept: --resume goes on after them" if kept else ""

    def _start(self, limits: Limits) -> dict[str, Any]:
        """An empty record."""
        return {"suite": self.suite, "limits": dataclasses.asdict(limits), **_here(), "cases": []}

    def _earlier(self) -> dict[str, Any] | None:
        """With --resume the record in --out, with the limits measured then; None where none is."""
        if not self.resume:
            return None
        if not self.out:
            raise UsageError("--resume continues the file that --out names; name it")
        try:
            old = json.loads(Path(self.out).read_text())
            if not all("label" in case for case in old["cases"]):
                raise KeyError("label")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.out} is no record that can be continued: {error!r}") from error
        found = {**old, "threads": old.get("limits", {}).get("threads")}
        for key, now in {
            "suite": self.suite, **_here(), "threads": torch.get_num_threads(),
        }.items():  # fmt: skip
            if (before := found.get(key)) != now:
                raise UsageError(
                    f"{self.out} was measured with {key} {before}, here it is {now}; "
                    "measure anew without --resume"
                )
        return dict(old)

    def _wanted(self, limits: Limits) -> list[tuple[str, Timed]]:
        """What to measure, by label."""
        if self.suite == "decode":
            return self._decode(limits)
        measure = _SUITES[self.suite].measure
        rounds = Repeats(self.repeats, self.patience, limits.flops)
        return [
            (describe(vars(case)), functools.partial(measure, case, limits, rounds))
            for case in self._chosen()
        ]

    def _chosen(self) -> list[Any]:
        """The cases that --only leaves; the decode suite has none of this kind."""
        if self.suite == "decode":
            return []
        chosen = [x for x in _SUITES[self.suite].cases() if self.only in describe(vars(x))]
        if not chosen:
            raise UsageError(f"--only {self.only!r} leaves no case")
        return chosen

    def _decode(self, limits: Limits) -> list[tuple[str, Timed]]:
        label = f"{self.geometry} at density 0.5"
        alone = functools.partial(decode.measure, self.geometry, 0.5, limits, self.repeats)
        wanted: list[tuple[str, Timed]] = [(label, alone)]
        if (absent := llama_cpp.missing()) is None:
            wanted += self._peers(limits)
        else:
            note(absent)
        return [
            (label, functools.partial(when_calm, timed, self.patience, limits.flops))
            for label, timed in wanted
        ]

    def _peers(self, limits: Limits) -> list[tuple[str, Timed]]:
        folder = (Path(self.work) if self.work else cache_folder() / "bench") / self.geometry
        note(f"models for llama.cpp: {folder}")
        llama_cpp.prepare(folder, self.geometry)
        repeats = min(self.repeats, 5)
        return [
            (
                f"{self.geometry} against llama.cpp {each.baseline}, {each.folder}",
                functools.partial(llama_cpp.measure, folder, self.geometry, each, limits, repeats),
            )
            for each in llama_cpp.CLASSES
        ]

    def _print(self, results: list[dict[str, Any]]) -> None:
        rows = []
        for result in results:
            times = result.get("milliseconds") or result["tokens_per_second"]
            share = f"{result['fraction_of_limit']:.2f} of {result['limit']}"
            ours, ratio = f"{times['gossamer']:.3g}", f"{result['ratio']:.2f}x"
            rows.append((describe(result["case"]), ours, ratio, _peer(result, times), share))
            if prompt := result.get("prompt_tokens_per_second"):
                name = f"{describe(result['case'])}, prompt"
                ours, ratio = f"{prompt['gossamer']:.3g}", f"{result['prompt_ratio']:.2f}x"
                rows.append((name, ours, ratio, _peer(result, prompt), "-"))
        unit = "tokens/s" if self.suite == "decode" else "ms"
        header = (
            "case",
            f"ours, {unit}",
            "ratio",
            f"best baseline and others, {unit}",
            "of the limit",
        )
        print_table(f"gossamer bench --suite {self.suite}", header, rows)
        if disturbed := sum(map(_disturbed, results)):
            note(
                f"{disturbed} of {len(results)} cases were measured while others used the machine; "
                "--resume with --out measures those again"
            )


def _here() -> dict[str, Any]:
    """What an earlier record must share with this run."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"kernels": _dispatch.describe(), "machine": machine(), "versions": versions}


def _disturbed(result: dict[str, Any]) -> bool:
    """Whether others used the machine meanwhile, as far as anybody watched."""
    return float(result.get("calm", 1.0)) < CALM


def _improve(record: dict[str, Any], limits: Limits) -> None:
    """Let the better of two measurements of the limits count: a disturbed one flatters every case."""
    for kind, binds in (("read", "bytes"), ("flops", "flops")):
        old, new = record["limits"][kind], getattr(limits, kind)
        if new > old:
            record["limits"][kind] = new
            for case in record["cases"]:
                if case.get("limit") == binds:
                    case["fraction_of_limit"] *= old / new


def _write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")


def _peer(result: dict[str, Any], times: dict[str, float]) -> str:
    """The engine that the ratio is to, then every other one."""
    best = result.get("best_dense", "transformers dense bfloat16")
    others = [name for name in times if name not in ("gossamer", best)]
    cells = [f"{times[name]:.3g} ({name.replace(' dense', '')})" for name in (best, *others)]
    return ", ".join(cells)


def describe(case: dict[str, Any]) -> str:
    """One line for a case."""
    if "name" in case:
        return str(case["name"])
    if "geometry" in case:
        return f"{case['geometry']} {case['dtype']} density {case['density']:g} batch 1"
    if "layers" in case:
        return (
            f"{case['layers']} layers {case['width']}x{case['width']} "
            f"density {case['density']:g} batch {case['batch']}"
        )
    block = f" block {case['block']}" if case.get("block") else ""
    block += f" held {case['form']}" if case.get("form") else ""
    return (
        f"{case['out']}x{case['inputs']} {case['dtype']} density {case['density']:g} "
        f"batch {case['batch']}{block}"
    )
