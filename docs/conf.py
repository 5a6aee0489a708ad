"""Sphinx builds the site from this folder; `make docs` runs it.

The pages are the Markdown files that also read well in a checkout, so what only a site needs (the
table of contents, the API reference) is added here and not in them.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import api  # noqa: E402 - beside this file

import gossamer  # noqa: E402

project = "Gossamer"
author = "the Gossamer developers"
copyright = "the Gossamer developers, Apache-2.0"
version = release = gossamer.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "*.py"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code by single backticks, as Markdown does
autosummary_generate = True
autosummary_imported_members = True
autodoc_typehints = "none"  # the sections of the docstrings say them in words
autodoc_member_order = "bysource"
add_module_names = False
numpydoc_show_class_members = False
templates_path = ["_templates"]

html_title = "Gossamer"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 6,
}
html_sidebars = {"index": [], "contributing": [], "glossary": []}

GUIDE = [
    "own-model", "weights", "attention", "attention-frontier", "caches", "diffusion", "activations",
    "training", "train-command", "ranks-and-trainers",
    "command-line", "kernels", "file-format", "lm-eval", "model-families", "results", "benchmarks",
    "claims", "testbeds", "limits",
]  # fmt: skip
METHODS = DOCS / "methods"
TOCTREES = {
    "guide/index": GUIDE,
    "methods/index": sorted(
        str(path.relative_to(METHODS).with_suffix(""))
        for path in METHODS.rglob("*.md")
        if path.name != "index.md"
    ),
}


def complete(app, page: str, source: list[str]) -> None:
    """Give a page what the site needs: README as the home page, links, tables of contents."""
    if page in ("index", "contributing"):
        name = "README.md" if page == "index" else "CONTRIBUTING.md"
        source[0] = site_links((DOCS.parent / name).read_text()) + source[0]
    source[0] = re.sub(r"^(https?://\S+)$", r"<\1>", source[0], flags=re.MULTILINE)
    if page in TOCTREES:
        entries = "\n".join(TOCTREES[page])
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def site_links(text: str) -> str:
    """The links of a page at the top of the checkout, as seen from this folder."""
    text = re.sub(r"\]\((?!\w+://|#|docs/)", "](../", text)
    return text.replace("](docs/", "](").replace("](../CONTRIBUTING.md", "](contributing.md")


def as_rst(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """What is plain text in a docstring and a mark in reStructuredText: |w|, and `Example:`."""
    text = "\n".join(lines)
    text = re.sub(r"^Example:$", ".. rubric:: Example\n\n.. code-block:: python", text, flags=re.M)
    lines[:] = re.sub(r"(?<![\\`])\|(?=[^|`]*\|)|(?<=[\w)])\|(?!`)", r"\|", text).split("\n")


def setup(app) -> None:
    """Called by Sphinx: write the pages of the API, then complete what is read."""
    api.write(DOCS / "api")
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", as_rst)
