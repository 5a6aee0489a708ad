"""The prose is easy to read: sentences of README, guide and public docstrings are short.

Counted are the words of running text: no code, tables, headings, signatures or types. A sentence
ends at a full stop, question or exclamation mark, or with its paragraph or item of a list.
"""

import inspect
import re
from pathlib import Path
from statistics import median

import pytest

import gossamer
from gossamer import methods

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/glossary.md",
    *sorted((ROOT / "docs/guide").glob("*.md")),
]
MEDIAN, LONGEST = 16, 40

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
NOT_PROSE = re.compile(r"^ *(\||#|!\[|<|:::|---|\.\. |:[a-z]+:).*$", re.MULTILINE)
ITEM = re.compile(r"^ *([-*+]|\d+\.) +", re.MULTILINE)
END = re.compile(r"(?<=[.!?])[)\"'`*]*\s+(?=[\"'(`*\[]*[A-Z0-9`\"'])|\n\s*\n")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|cf|et al|etc)\.")


def sentences(text: str) -> list[str]:
    """The sentences of running text in Markdown or a docstring."""
    text = FENCE.sub("\n\n", text)
    text = NOT_PROSE.sub("\n\n", text)
    text = ITEM.sub("\n\n", text)
    text = re.sub(r"`+[^`]*`+", "`code`", text)  # a name or a call reads as one word
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = ABBREVIATION.sub(r"\1", text)
    parts = (" ".join(part.split()) for part in END.split(text))
    return [part for part in parts if words(part) > 1]


def words(sentence: str) -> int:
    """How many words a reader reads; signs and bare punctuation are none."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def docstring(thing: object) -> str:
    """The docstrings of a public name: its own and, of a class, those of its public methods."""
    texts = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        members = [
            part
            for key, part in vars(thing).items()
            if not key.startswith("_") and (inspect.isfunction(part) or isinstance(part, property))
        ]
        texts += [inspect.getdoc(part) or "" for part in members]
    return "\n\n".join(plain(text) for text in texts)


def plain(doc: str) -> str:
    """The prose of a docstring: no examples, references, headings and types of parameters."""
    doc = re.split(r"\n\s*(?:Example:\n|(?:Examples|References)\n\s*-{3,}\n)", doc)[0]
    doc = re.sub(r"^.*\n *-{3,} *$", "", doc, flags=re.MULTILINE)
    return re.sub(r"^\S.*\n(?= {4}\S)", "\n", doc, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_have_short_sentences(page):
    check(page.stem, sentences(page.read_text()))


def test_public_docstrings_have_short_sentences():
    modules = [gossamer, *map(methods.topic, filter(methods.topic, methods.TOPICS))]
    things = [getattr(module, name) for module in modules for name in module.__all__]
    check("docstrings", [s for thing in things for s in sentences(docstring(thing))])


def check(name: str, found: list[str]) -> None:
    lengths = [words(s) for s in found]
    longest = max(found, key=words)
    assert median(lengths) <= MEDIAN, f"{name}: median {median(lengths)} words; {longest}"
    assert max(lengths) <= LONGEST, f"{name}: {max(lengths)} words: {longest}"


def test_the_counter_counts():
    text = """# A heading of no interest at all

One two three. Four `five six` [seven eight](https://x.y/z.html), nine! (Ten, e.g. eleven.)

| a | table |
|---|---|

- An item without an end
- Another, with 1.5 of them

```python
code = "is not prose."
```
"""
    assert [words(s) for s in sentences(text)] == [3, 5, 3, 5, 5]
    doc = """Keep the best.

Parameters
----------
scores : Tensor of any dtype
    By the name of the layer.

Raises
------
UsageError
    Never.
    Or seldom.

Examples
--------
>>> keep(scores)
"""
    assert sentences(plain(doc)) == ["Keep the best.", "By the name of the layer.", "Or seldom."]
