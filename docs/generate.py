"""Writes docs/methods/*.md from the cards. Run: python docs/generate.py"""

from __future__ import annotations

from pathlib import Path

from gossamer.core.card import Card
from gossamer.methods import cards, find

OUT = Path(__file__).parent / "methods"


def page(card: Card) -> str:
    """The page of one method."""
    needs = ", ".join(card.needs) or "nothing: no calibration data"
    return f"""# {card.name}

{card.summary}

- Paper: [{card.title}]({card.link}), {card.year}
- Kind: {card.kind}; status: {card.status}
- Needs: {needs}
- Patterns: {", ".join(card.patterns)}
- Defaults: {card.defaults}

**What the paper claims.** {card.claim}

**Notes.** {card.notes}

```
{usage(card)}
```
"""


def usage(card: Card) -> str:
    """How to run the method: on the command line, or around a training loop."""
    if card.kind != "trainer":
        return f"gossamer compress --method {card.name} --sparsity 0.5"
    name = find(card.name).__name__
    argument = "" if card.patterns == ("nm",) else "density=0.1"
    return f"""with gs.sparse_training(model, optimizer, gs.{name}({argument}), total_steps=n):
    ...  # the loop as it was: loss.backward(); optimizer.step()"""


def pages() -> dict[str, str]:
    """File name to content, the index included."""
    lines = [f"- [{card.name}]({card.name}.md): {card.summary}" for card in cards()]
    index = "# Methods\n\nWritten from the cards by `make docs`.\n\n" + "\n".join(lines) + "\n"
    return {"index.md": index, **{f"{card.name}.md": page(card) for card in cards()}}


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, text in pages().items():
        (OUT / name).write_text(text)
