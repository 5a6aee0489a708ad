"""The published methods: a folder per topic, a file per method.

A topic's `__init__` is its registry: one import and one name in `__all__` per method.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from gossamer.core import words
from gossamer.core.card import Card
from gossamer.core.errors import UsageError

TOPICS = {
    "weights": "weights, after or during training",
    "activations": "neurons, inputs of layers, tokens, frames and spikes",
    "attention": "attention maps and key-value caches",
    "experts": "mixtures of experts: routers, dispatch, placement and pruning",
    "features": "sparse autoencoders, concepts and prototypes",
    "adapters": "sparse updates of a pretrained model",
    "masking": "masked modelling: what is hidden while a model learns",
    "recovery": "sparse codes, regressions and plans",
    "graphs": "edges and nodes of graphs and meshes",
    "retrieval": "sparse term vectors, inverted indexes, embedding tables",
}
"""What becomes sparse, by topic."""


def topic(name: str) -> ModuleType | None:
    """The public namespace of a topic, None where none of its methods is built yet."""
    if name not in TOPICS or find_spec(f"{__name__}.{name}") is None:
        return None
    return importlib.import_module(f"{__name__}.{name}")


def methods(topics: str = "", roles: tuple[str, ...] = ()) -> dict[str, type[Any]]:
    """Published methods by `topic.name`, in order of topic, year and name.

    Parameters
    ----------
    topics : str
        One topic; all of them where it is empty.
    roles : tuple of str
        The roles that are wanted; all of them where it is empty.
    """
    modules = [topic(name) for name in TOPICS if topics in ("", name)]
    classes = [getattr(m, name) for m in modules if m is not None for name in m.__all__]
    wanted = [x for x in classes if x.card.link and (not roles or x.card.role in roles)]
    wanted.sort(key=lambda x: (list(TOPICS).index(x.card.topic), x.card.year, x.card.name))
    return {f"{x.card.topic}.{x.card.name}": x for x in wanted}


def cards(topics: str = "") -> tuple[Card, ...]:
    """List the cards of one topic's methods, or of all.

    Parameters
    ----------
    topics : str
        One topic. All of them where it is empty.

    Examples
    --------
    >>> import gossamer as gs
    >>> [card.name for card in gs.cards("weights") if "hessian" in card.needs]
    ['sparsegpt']
    """
    return tuple(x.card for x in methods(topics).values())


def summary(method: type[Any]) -> str:
    """The first line of the docstring of a method's module."""
    text = importlib.import_module(method.__module__).__doc__ or ""
    return text.strip().partition("\n")[0]


def verdicts() -> dict[str, str]:
    """What became of each method's claim here, as `topic.name`, for those that were tried."""
    return json.loads((resources.files("gossamer.methods") / "verdicts.json").read_text())


def find(name: str) -> type[Any]:
    """Find the class of a method by its name.

    Parameters
    ----------
    name : str
        Its card's name, in any case, such as `wanda`. Where several topics have a method of this
        name, the topic stands before it, as in `weights.random`.

    Returns
    -------
    type
        The class, which is called to get a method.

    Raises
    ------
    UsageError
        For an unknown name, with near ones, and for one that several topics have.

    Examples
    --------
    >>> import gossamer as gs
    >>> gs.find("wanda")()
    Wanda(scope='row')
    """
    found: type[Any] = chosen_of(name, methods())
    return found


def chosen_of(name: str, every: Mapping[str, Any]) -> Any:
    """What stands in `every`, by `topic.name`, under a name with or without its topic.

    Raises UsageError for an unknown name, with near ones, and for one that several topics have.
    """
    return words.known(name, _by_name(name, every), "method")


def build(text: str) -> Any:
    """A method from its name and options: `sparsegpt`, `sparsegpt:block=64,damping=0.02`.

    A method that starts from another names it as an option, whose own options follow behind a dot:
    `dsnot:start=sparsegpt,start.block=64`.

    Raises UsageError for an unknown name or option, naming near ones, or a value that is refused.
    """
    return words.build(text, _by_name(text.partition(":")[0], methods()), "method", build)


def parts(text: str) -> tuple[type[Any], dict[str, Any]]:
    """A method's class and its options from such a text; raises UsageError as `build` does."""
    return words.parts(text, _by_name(text.partition(":")[0], methods()), "method", build)


def _by_name(wanted: str, every: Mapping[str, Any]) -> dict[str, Any]:
    """By name alone, or by topic and name; raises where `wanted` is in several topics."""
    short = wanted.strip().lower()
    same = [key for key in every if key.partition(".")[2] == short]
    if len(same) > 1:
        raise UsageError(f"several topics have a method {short!r}: write {' or '.join(same)}")
    if "." in short:
        return dict(every)
    return {key.partition(".")[2]: x for key, x in every.items()}
