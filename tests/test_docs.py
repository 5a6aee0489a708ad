"""The generated pages are current, and what the README and the guide name exists."""

import importlib.util
import inspect
import json
import operator
import re
import statistics
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer import cli, methods
from gossamer.cli import COMMANDS

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))


def test_method_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, text in generate.pages().items():
        assert (ROOT / "docs" / "methods" / name).read_text() == text, "run make docs"
    assert generate.VERDICTS.read_text() == generate.verdicts(), "run make docs"
    assert generate.BENCHMARKS.read_text() == generate.benchmarks(), "run make docs"
    assert generate.FRONTIER.read_text() == generate.frontier(), "run make docs"


def test_the_own_model_page_runs(tiny_llama, tmp_path, monkeypatch):
    text = (ROOT / "docs/guide/own-model.md").read_text()
    load, *blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7 and "AutoTokenizer.from_pretrained(name)" in load
    notes = "".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(400))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(notes)
    (tmp_path / "held_out.txt").write_text(notes[:2000])
    names = {"model": tiny_llama(), "tokenizer": Bytes()}
    exec("\n".join(blocks), names)
    assert names["result"].measured_density == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "small-dense" / "config.json").is_file()


def test_the_readme_runs(tiny_llama, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in block.splitlines() if "Auto" not in line]  # no hub in tests
    assert len(lines) == len(block.splitlines()) - 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.txt").write_text("".join(f"line {n} of {n * n}\n" for n in range(900)))
    names = {"model": tiny_llama(), "tokenizer": Bytes()}
    exec("\n".join(lines), names)
    assert names["result"].measured_density == pytest.approx(0.5, abs=0.01)
    assert names["model"] is not names["fast"].model


class Bytes:
    """A tokenizer whose tokens are bytes, with what the page calls."""

    def __call__(self, text, return_tensors=None):
        ids = list(text.encode())
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids):
        return bytes(ids.tolist()).decode("utf-8", "replace")

    def save_pretrained(self, folder):
        pass


def test_the_readme_is_short_and_shows_code_first():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) < 100 and lines.index("```python") < 30
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 12
    assert "make demo" in text and "make test" in text


def figures() -> dict[str, list[float]]:
    """What the README's table must say, by the start of its rows, from the records."""
    results = ROOT / "benchmarks" / "results"
    smollm2, minilm, decode, kernels = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("smollm2", "minilm", "decode", "kernels")
    )
    bits = {name: one["bits_per_byte"] for name, one in smollm2["summary"].items()}
    speeds = {
        (case["case"]["dtype"], case["case"].get("baseline"), case["case"]["density"],
         case["case"].get("pattern")): case["ratio"]
        for case in decode["cases"]
    }  # fmt: skip

    def layer(**wanted: object) -> list[float]:
        found = [
            case["ratio"]
            for case in kernels["cases"]
            if all(case["case"].get(key, "") == value for key, value in wanted.items())
        ]
        assert len(found) == 1, wanted
        return found

    decoding = smollm2["parts"]["decoding"]
    return {
        "SmolLM2-135M": [smollm2["parts"]["dense"]["bits_per_byte"], bits["sparsegpt"]],
        "the same by Wanda": [bits["wanda"], bits["magnitude"]],
        "the same: decoding": [decoding["gain"]],
        "MiniLM": [minilm["similarity"]["50%"]["sparsegpt"]],
        "Llama of 1.1": [speeds["bfloat16", "llama.cpp F16", 0.5, "unstructured:row"]],
        "the same in int4": [speeds["int4", "llama.cpp Q4_0", 0.5, "2:4"]],
        "layer of 4096 x 11008": layer(
            out=4096, inputs=11008, dtype="bfloat16", batch=1, density=0.2, block="", form=""
        ),
        "layer of 4096 x 4096": layer(
            out=4096, inputs=4096, dtype="float32", batch=128, density=0.1, block=""
        ),
    }


def test_the_readme_has_the_measured_figures():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \| \[\w+\]\(benchmarks", text, re.MULTILINE))
    expected = figures()
    assert len(rows) == len(expected) == 8
    for start, values in expected.items():
        (cell,) = [cell for what, cell in rows.items() if what.startswith(start)]
        digits = 2 if cell.endswith("x") else 3
        assert re.findall(r"[\d.]+", cell) == [f"{value:.{digits}f}" for value in values], start


def conf() -> str:
    """The site's settings, as text: Sphinx is not needed to test them."""
    return (ROOT / "docs" / "conf.py").read_text()


def test_every_page_of_the_guide_is_in_the_table_of_contents():
    (listed,) = re.findall(r"^GUIDE = \[(.*?)\]", conf(), re.MULTILINE | re.DOTALL)
    pages = {path.stem for path in (ROOT / "docs" / "guide").glob("*.md")} - {"index"}
    assert set(re.findall(r'"([\w-]+)"', listed)) == pages


def test_every_public_name_is_in_the_api_reference():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    listed = re.findall(r"^   ([\w.]+)$", api.pages()["index.md"], re.MULTILINE)
    assert {name.rpartition(".")[2] for name in public()} == set(listed)
    groups = {name: api.group_of(getattr(gossamer, name)) for name in ("prune", "NM", "OWL")}
    assert groups == {"prune": "Functions", "NM": "Patterns", "OWL": "Allocations"}


def public() -> dict[str, object]:
    """Every public name, those of the topics included."""
    found = {name: getattr(gossamer, name) for name in gossamer.__all__}
    for topic in filter(methods.topic, methods.TOPICS):
        module = methods.topic(topic)
        found |= {f"{topic}.{name}": getattr(module, name) for name in module.__all__}
    return found


def documented(thing: object) -> list[str]:
    """The names in the Parameters or Attributes of a docstring."""
    text = inspect.getdoc(thing) or ""
    section = re.search(
        r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL
    )
    lines = re.findall(r"^(\S.*?)(?: : .*)?$", section[1], re.MULTILINE) if section else []
    return [name for line in lines for name in line.split(", ")]


def test_docstrings_document_the_parameters_that_there_are():
    found = {name: documented(thing) for name, thing in public().items()}
    assert sum(map(bool, found.values())) > 60
    for name, thing in public().items():
        if is_dataclass(thing):
            real = [field.name for field in fields(thing)]
        elif inspect.isclass(thing):
            continue
        else:
            real = list(inspect.signature(thing).parameters)
        if found[name] or inspect.isfunction(thing):
            assert sorted(found[name]) == sorted(real), name


@pytest.mark.parametrize(
    "path",
    ["README.md", "CONTRIBUTING.md", *(f"docs/guide/{p.name}" for p in GUIDE)],
)
def test_links_and_commands_exist(path):
    file = ROOT / path
    text = file.read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if "://" in target:
            continue
        linked = file.parent / target if target else file
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{target}#{anchor}"
    for command, rest in re.findall(r"^\s*gossamer (\w+)((?:.|\\\n)*)", text, re.MULTILINE):
        assert command in COMMANDS, command
        options = {field.name for field in fields(cli.command(command))} | {"config", "debug"}
        for option in re.findall(r"--([\w-]+)", rest):
            assert option.replace("-", "_") in options, f"gossamer {command} --{option}"
    for name in re.findall(r"\bgs\.([A-Za-z_]+(?:\.[A-Z]\w*)?)", text):
        assert operator.attrgetter(name)(gossamer), name


def test_the_page_on_attention_says_what_was_measured():
    text = (ROOT / "docs/guide/attention.md").read_text()
    record = json.loads((ROOT / "benchmarks/results/attention_prefill.json").read_text())["parts"]
    rows = re.findall(r"^\| `(\w+:[^`]+)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == sum(key.startswith("4096: ") and ":" in key[6:] for key in record) > 3
    for method, cells in rows:
        found, times = record[f"4096: {method}"], record["4096: attention"][method]
        wanted = (
            f"{found['density']:.2f} | {found['recall']:.3f} | {found['bits_per_byte']:.3f} | "
            f"{times['over_sdpa']:.1f}x | {times['over_dense_layout']:.1f}x"
        )
        assert cells == wanted, method
    assert f"bits per byte of {record['4096: sdpa']['bits_per_byte']:.3f}" in text


def test_the_page_on_caches_says_what_was_measured():
    text = (ROOT / "docs/guide/caches.md").read_text()
    record = json.loads((ROOT / "benchmarks/results/attention_caches.json").read_text())["parts"]
    rows = dict(re.findall(r"^\| `([\w:]+)` \| (\d of .+) \|$", text, re.MULTILINE))
    assert list(rows) == list(record["needle 0"])
    for name, cells in rows.items():
        needles, bits = (
            [record[f"{part} {seed}"][name] for seed in range(3)] for part in ("needle", "text")
        )
        shares = [
            needles[0][key] for key in ("density", "bytes_read_of_dense", "resident_of_dense")
        ]
        wanted = [f"{sum(x['found'] for x in needles)} of 6"]
        wanted += [
            f"{sum(x['bits_per_byte'] for x in bits) / 3:.3f}",
            *(f"{x:.2f}" for x in shares),
        ]
        assert cells == " | ".join(wanted), name
    speed = dict(re.findall(r"^\| `([\w: ]+)` \| (\d\.\dx .+) \|$", text, re.MULTILINE))
    times = record["speed"]
    assert {*speed, "transformers"} == set(times)
    for name, cells in speed.items():
        gain = times["every key"]["seconds"] / times[name]["seconds"]
        over, held = times[name]["over_transformers"], times[name]["resident_of_dense"]
        assert cells == f"{over:.1f}x | {gain:.2f}x | {held:.2f}", name
    theirs = json.loads((ROOT / "benchmarks/results/attention_kvpress.json").read_text())
    for name in ("SnapKV, averages without the window's keys", "AdaSnapKV on kvpress's scores"):
        assert theirs[name]["heads_identical"] == theirs[name]["heads"] == 90


def test_the_page_on_diffusion_says_what_was_measured():
    text = (ROOT / "docs/guide/diffusion.md").read_text()
    record = json.loads((ROOT / "benchmarks/results/attention_video.json").read_text())
    rows = re.findall(r"^\| ([\w.]+ ?[\d.]*) \| ([\w, ]+) \| ([\d. |]+) \|$", text, re.MULTILINE)
    assert len(rows) == len(record["parts"]) > 10
    for density, name, cells in rows:
        seeds = list(record["parts"][f"{density}: {name}"]["seeds"].values())
        assert len(seeds) == record["plan"]["seeds"] == 3
        mean = {key: statistics.fmean(seed[key] for seed in seeds) for key in seeds[1]}
        wanted = (
            f"{mean['density']:.2f} | {mean['sparse_density']:.2f} | {mean['psnr']:.1f} | "
            f"{mean['loss']:.4f} | {seeds[0]['error']:.2f}"
        )
        assert cells == wanted, name
    assert f"dense loss is {statistics.fmean(record['dense'].values()):.4f}" in text


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and Sphinx make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_contributing_quotes_classes_as_they_are():
    def lines(text):  # of any indentation: ruff formats the blocks of this page
        return "\n".join(line.strip() for line in text.split("\n") if line.strip())

    files = sorted((ROOT / "src/gossamer/methods").rglob("*.py"))
    source = "\n".join(lines(path.read_text()) for path in files)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        assert lines(block) in source, block
