"""The sweep over model families: `python tests/sweep/run.py [--write] [name ...]`.

Every family goes through three processes: `write` prunes, compresses and saves, `load` loads,
generates and exports, `plain` reads what was exported and never imports Gossamer. A process that
dies is a crash of its family.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from families import Family, every
from rows import Row

STAGES = ("write", "load", "plain")
PATIENCE = 300.0
"""Seconds after which a process counts as dead."""
PROCESSES = get_context("forkserver")
# What takes long to import, once for all processes; nothing of Gossamer.
PROCESSES.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.t5.modeling_t5",
        "transformers.models.vit.modeling_vit",
    ]
)


def stage(which: str, work: Path, name: str, quick: bool) -> None:
    """What a process does: one stage of one family."""
    family = next(family for family in every() if family.name == name)
    row = read(work, family)
    if which == "write":
        import steps

        steps.walk(row, family, work, steps.variants(quick))
    else:
        reading(which, row, family, work)
    if which == "plain" and "gossamer" in sys.modules:
        row.steps["plain"] = "WRONG: the process without Gossamer imported it"
    row.facts.setdefault("finished", []).append(which)
    (work / f"{name}.json").write_text(json.dumps(asdict(row)))


def read(work: Path, family: Family) -> Row:
    """What is known of a family so far."""
    file = work / f"{family.name}.json"
    return Row(**json.loads(file.read_text())) if file.exists() else Row(family.name, family.kind)


def reading(which: str, row: Row, family: Family, work: Path) -> None:
    """The second or the third stage, on every folder of the family that was saved."""
    import fresh

    for step in [s for s in row.steps if s.startswith("save ") and row.passed(s)]:
        name = step.removeprefix("save ")
        folder = work / family.name / name.replace(" ", "-").replace("%", "")
        (fresh.load if which == "load" else fresh.plain)(row, family, folder, name)


def through(family: Family, work: Path, quick: bool) -> Row:
    """All stages of one family, each in a fresh process."""
    missing = [need for need in family.needs if importlib.util.find_spec(need) is None]
    if missing:
        return Row(family.name, family.kind, {"build": f"skipped: {missing[0]} is not installed"})
    (work / f"{family.name}.json").unlink(missing_ok=True)
    shutil.rmtree(work / family.name, ignore_errors=True)
    for which in STAGES:
        process = PROCESSES.Process(target=stage, args=(which, work, family.name, quick))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
        row = read(work, family)
        # 255 is also what multiprocessing says where it lost the status of a process that ended.
        if process.exitcode not in (0, 255) or which not in row.facts.get("finished", ()):
            row.steps[f"process {which}"] = f"CRASH: the process ended with {process.exitcode}"
            return row
    return read(work, family)


def sweep(names: list[str], work: Path, quick: bool = False, beside: int = 2) -> Iterator[Row]:
    """The rows of the families named, or of all, `beside` of them at a time on one thread each."""
    known = {family.name: family for family in every()}
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    with ThreadPoolExecutor(beside) as pool:
        yield from pool.map(lambda name: through(known[name], work, quick), names or list(known))


def main() -> None:
    """Run what the command line asks for, and say what did not end well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all by default")
    parser.add_argument("--work", type=Path, help="where folders and rows go, by default temporary")
    parser.add_argument("--quick", action="store_true", help="three prunings instead of seven")
    parser.add_argument("--write", action="store_true", help="write the record and the page")
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="sweep-"))
    rows = []
    for row in sweep(asked.names, work, asked.quick):
        rows.append(row)
        bad = "FAULT" if row.faults() else "ok"
        print(f"{row.name:30} {sum(row.seconds.values()):6.1f} s  {bad}", flush=True)
        for step, outcome in row.steps.items():
            if outcome != "ok":
                print(f"    {step}: {outcome}")

    if asked.write:
        import page

        page.write(page.record(rows))


if __name__ == "__main__":
    main()
