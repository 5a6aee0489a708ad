"""The report in a real browser: what the DOM holds, hostile names, and no sideways scrolling."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gossamer.report.html import render

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
    assert sum("bitmap-matvec" in row for row in cells) == sum(
        bool(layer["kernel"]) for layer in RESULT["layers"]
    )
    assert text.count("<circle") == len(RESULT["sweep"])


def test_a_phone_does_not_scroll_sideways(tmp_path):
    probe = (
        "<script>document.title = 'width ' + document.documentElement.scrollWidth + ' of ' "
        "+ window.innerWidth</script></body>"
    )
    text = dom(render(RESULT).replace("</body>", probe), tmp_path)
    width, window = map(int, re.search(r"<title>width (\d+) of (\d+)</title>", text).groups())
    assert width <= window
