"""The report in a real browser: what the DOM holds, hostile names, and no sideways scrolling."""

import copy
import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from gossamer.report.html import render
from gossamer.report.notes import layer_notes

RESULT = json.loads((Path(__file__).parents[2] / "benchmarks/results/demo.json").read_text())
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--timeout=20000",
]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


def dom(page, tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian package chromium)")
    file = tmp_path / "report.html"
    file.write_text(page)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,900"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{file}"], capture_output=True, text=True, timeout=90
    )
    return done.stdout


def test_no_scripts_and_no_network():
    page = render(RESULT)
    assert "<script" not in page and "http" not in page and "url(" not in page


def test_names_from_files_are_escaped():
    result = copy.deepcopy(RESULT)
    result["layers"][0]["name"] = result["command"] = result["layers"][-1]["reason"] = HOSTILE
    page = render(result)
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page


def test_the_browser_shows_the_figures(tmp_path):
    text = dom(render(RESULT), tmp_path)
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.sub("<.*?>", "|", row) for row in rows]
    assert any(f"{RESULT['quality']['sparse']:.4f}" in row for row in cells)
    folded = text[text.index("<details>") : text.index("</details>")]
    assert folded.count("bitmap-matvec/") == sum(bool(x["kernel"]) for x in RESULT["layers"])
    assert sum("bitmap-matvec/" in row for row in cells) == folded.count("bitmap-matvec/") + 7
    assert text.count("<circle") == len(RESULT["sweep"]) + 1  # and the dense model


def whole():
    """A result as it is written today: with a name, coverage, a busy machine, a long name."""
    result = copy.deepcopy(RESULT)
    left = [
        {"name": f"model.layers.{n}.experts.gate_up_proj", "kind": "Experts", "count": 1_000_000,
         "reason": "three-dimensional expert weights"} for n in range(4)
    ] + [{"name": "lm_head.weight", "kind": "Linear", "count": 65536, "reason": "an output head"}]  # fmt: skip
    result["model"] = "organisation/" + "a-model-with-a-very-long-name-" * 3
    result["coverage"] = {"pruned": {
        "total": 8_000_000, "matrices": 7_900_000, "prunable": 3_700_000, "pruned": 3_700_000,
        "nonzero": 6_150_000, "packed": 0, "left_out": left,
    }}  # fmt: skip
    result["speed"] |= {"disturbed": 3, "gain": 1.15, "gain_low": 0.7, "gain_high": 1.6}
    result["bytes"] |= {"files": 12_000_000, "model_dense": 16_000_000}
    result |= {"source": "float32", "dtype": "bfloat16"}
    return result


def test_the_page_names_the_model_and_what_was_left_alone():
    text = re.sub("(<.*?>)+", "|", render(whole()))
    assert whole()["model"] in text and "Pruned 46.8% of the model's matrix weights" in unescape(
        text
    )
    assert "model.layers.*.experts.gate_up_proj" in text and "|4|4.00 M|" in text
    assert "zero 23.1%" in text and "left alone 53.8%" in text
    assert "bytes of the whole model's files" in unescape(text) and "0.75x" in text
    assert "machine busy: 3 of 5 rounds disturbed" in text and "(0.70 to 1.60)" in text
    assert "The source holds float32" in text


def test_reasons_are_counted_not_repeated():
    result = copy.deepcopy(RESULT)
    for n, layer in enumerate(result["layers"]):
        layer |= {"kernel": None, "reason": f"no kernel wins: predicted dense {n / 7:.3f} ms"}
    first, line = layer_notes(result["layers"])
    count = len(result["layers"])
    assert line.startswith(f"{count} layers run dense: such as no kernel wins") and "..." in line
    assert f"0 of {count} layers run sparse" in first


@pytest.mark.parametrize("result", [RESULT, whole()], ids=["old", "new"])
def test_a_phone_does_not_scroll_sideways(result, tmp_path):
    page = render(result).replace("<details>", "<details open>")
    probe = (
        "const page = document.querySelector('iframe').contentDocument;"
        "const wide = [page.documentElement, ...page.querySelectorAll('.wide')];"
        "document.title = 'over ' + wide.filter(x => x.scrollWidth > x.clientWidth).length"
        " + ' of ' + wide.length + ' in ' + page.documentElement.clientWidth;"
    )
    frame = f'<iframe width=390 height=900 style="border:0" srcdoc="{escape(page)}"></iframe>'
    text = dom(f'<body onload="{escape(probe)}">{frame}</body>', tmp_path)
    over, count, width = map(int, re.search(r"over (\d+) of (\d+) in (\d+)", text).groups())
    assert over == 0 and count > 2 and width <= 390
