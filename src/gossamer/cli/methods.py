"""gossamer methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gossamer.cli.output import print_json, print_table, print_text
from gossamer.core.card import Card
from gossamer.methods import TOPICS, chosen_of, verdicts
from gossamer.methods.listing import Listed, listed

USE = {
    "scorer": "gossamer compress",
    "solver": "gossamer compress",
    "topology": "gossamer train",
    "learned_mask": "gs.sparse_training, from Python",
    "replacer": "gs.replace_layers, from Python",
    "planner": "gs.prune, from Python",
    "gradient_source": "gossamer train",
    "recipe": "gossamer train",
    "input_scorer": "gs.sparsify_activations, or gossamer generate --activations",
    "neuron_selector": "gs.sparsify_activations, from Python",
    "corrector": "gs.generate_corrected, from Python",
    "key_scorer": "gs.sparse_attention, or gossamer generate --attention",
    "cache": "gs.attention_cache, or gossamer generate --cache",
    "step_attention": "gs.sparse_denoising, from Python",
    "layer": "a torch module, from Python",
}
"""What runs a method, by its role."""

NOTES = {
    "weights": "Scorers and solvers prune a trained model (gossamer compress). Topology methods "
    "and recipes make a model sparse while it trains, and gradient sources train without a "
    "backward pass (gossamer train). Learned masks, replacers and planners are used from Python.",
    "activations": "Input scorers choose the inputs of layers that each new token reads "
    "(gs.sparsify_activations from Python, gossamer generate --activations).",
    "attention": "Key scorers choose which pairs of a prompt's tokens are attended "
    "(gs.sparse_attention from Python, gossamer generate --attention). Caches keep keys and values of "
    "past tokens, or read a part of them (gs.attention_cache, gossamer generate --cache). Step "
    "attention follows the steps of a diffusion model (gs.sparse_denoising from Python). Layers are "
    "modules of torch, used from Python.",
}
"""What runs the methods of a topic."""


@dataclass
class Methods:
    """List the topics, the methods of one topic, or show the page of one method.

    Example: gossamer methods weights
    """

    PLACES = ("name",)

    name: str = ""
    """a topic, such as weights, or a method, such as sparsegpt"""
    json: bool = False
    """print one JSON object with every card and verdict"""

    def run(self) -> None:
        """Print the topics, a topic's table or a method's page."""
        name = self.name.strip().lower()
        if self.json:
            _print_json([name] if name in TOPICS else [] if name else list(TOPICS), name)
        elif not name:
            _print_topics()
        elif name in TOPICS:
            _print_topic(name)
        else:
            _print_page(_named(name))


def _named(name: str) -> Listed:
    """The one method of this name; raises UsageError as `gossamer.find` does."""
    every = {f"{x.card.topic}.{x.card.name}": x for topic in TOPICS for x in listed(topic)}
    chosen: Listed = chosen_of(name, every)
    return chosen


def _print_json(topics: list[str], name: str) -> None:
    found = verdicts()
    chosen = [x.card for topic in topics for x in listed(topic)] or [_named(name).card]
    both = [dataclasses.asdict(card) | {"verdict": found.get(_key(card))} for card in chosen]
    print_json({"methods": both})


def _print_topics() -> None:
    rows = [(name, str(len(listed(name)) or "none yet"), what) for name, what in TOPICS.items()]
    print_table("Topics", ("topic", "methods", "what becomes sparse"), rows)
    print_text("gossamer methods TOPIC lists a topic's methods; gossamer methods NAME shows one.")


def _print_topic(name: str) -> None:
    found = verdicts()
    rows = [
        (x.card.name, x.card.role, str(x.card.year), _short(found.get(_key(x.card))), x.summary)
        for x in listed(name)
    ]
    if not rows:
        print_text(f"{name}: no method of this topic is built yet.")
        return
    print_table(f"{name}: {TOPICS[name]}", ("name", "role", "year", "claim", "what"), rows)
    print_text(NOTES.get(name, "The methods of this topic are used from Python."))
    print_text(
        "claim: what became of the paper's claim on small tasks here; open means undecided. "
        "gossamer methods NAME has the details."
    )


def _key(card: Card) -> str:
    return f"{card.topic}.{card.name}"


def _short(verdict: str | None) -> str:
    words = {
        "undecided": "open",
        "not testable here": "untestable",
        "does not hold here": "no",
        None: "not tried",
    }
    return words.get(verdict, verdict or "")


def _print_page(method: Listed) -> None:
    card = method.card
    for paragraph in method.text.split("\n\n"):
        print_text(" ".join(paragraph.replace("**", "").split()))
        print_text("")
    rows = [
        ("in Python", f"gossamer.{card.topic}.{method.name}"),
        ("topic and role", f"{card.topic}, {card.role}: {USE.get(card.role, 'used from Python')}"),
        ("needs", ", ".join(card.needs) or "no data"),
        ("patterns", ", ".join(card.patterns)),
        ("paper", f"{card.link}, {card.year}"),
        ("status", card.status),
        ("claim here", verdicts().get(_key(card), "not tried")),
    ]
    for name, value in rows:
        print_text(f"{name}: {value}")
