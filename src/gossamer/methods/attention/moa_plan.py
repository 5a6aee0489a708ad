"""Plans of MoA: a rule for each head, which gives its window at any length, as data."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, UsageError
from gossamer.core.files import write_whole
from gossamer.methods.attention.moa_programme import Question, fronts

Rule = tuple[int, float]
"""(alpha, beta): the window of a text of so many keys is alpha + beta * keys."""
_MOST_LENGTHS = 5
_BETAS = tuple(eighth / 8 for eighth in range(9))


@dataclass(frozen=True)
class Plan:
    """Rules by layer and head of keys, for blocks of one size."""

    block: int
    rules: tuple[tuple[Rule, ...], ...]

    def windows(self, layer: int, keys: int) -> list[int]:
        """Blocks of each head's window, its own included."""
        return [window(rule, keys, self.block) for rule in self.rules[layer]]

    def density(self, keys: int) -> float:
        """Kept keys of the last query over all, averaged over heads."""
        every = [rule for layer in self.rules for rule in layer]
        return sum(share(rule, keys, self.block) for rule in every) / len(every)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        text = json.dumps(
            {"format": "gossamer.moa", "version": 1, "block": self.block, "rules": self.rules}
        )
        write_whole(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))

    @staticmethod
    def load(path: Path) -> Plan:
        """Read what `save` wrote; raises FormatError for anything else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"there is no plan of MoA at {path}") from None
        except (OSError, ValueError) as error:
            raise FormatError(f"{path} is no plan of MoA: {error}") from None
        return _read(found, path)


def _read(found: Any, path: Path) -> Plan:
    named = isinstance(found, dict) and found.get("format") == "gossamer.moa"
    if not named or set(found) != {"format", "version", "block", "rules"}:
        raise FormatError(f"{path} is no plan of MoA")
    if found["version"] != 1:
        raise FormatError(f"{path} is a plan of version {found['version']!r}; this reads version 1")
    try:
        rules = tuple(tuple((int(a), float(b)) for a, b in layer) for layer in found["rules"])
        plan = Plan(int(found["block"]), rules)
    except (TypeError, ValueError):
        raise FormatError(f"{path}: a rule is a list of alpha and beta") from None
    numbers = all(math.isfinite(b) and 0 <= b <= 1 for layer in rules for _, b in layer)
    if (
        plan.block < 1
        or not rules
        or len({len(layer) for layer in rules} - {0}) != 1
        or not numbers
    ):
        raise FormatError(
            f"{path}: blocks are of 1 or more tokens, betas from 0 to 1, and layers have equally "
            "many heads"
        )
    return plan


def window(rule: Rule, keys: int, block: int) -> int:
    """Blocks of the window, at least the query's own; rounded down like the release's."""
    alpha, beta = rule
    return max(1, math.floor(alpha // block + beta * (keys // block)))


def share(rule: Rule, keys: int, block: int) -> float:
    """The blocks that a last query keeps, the first one included, over all."""
    blocks = -(-keys // block)
    return min(blocks, window(rule, keys, block) + 1) / blocks


def rules_for(lengths: Sequence[int], block: int, step: int) -> list[Rule]:
    """Rules whose windows lie within every length, each of different windows."""
    found: dict[tuple[int, ...], Rule] = {}
    bound = min(lengths) // step
    for alpha in range(-bound * step, bound * step + 1, step):
        for beta in _BETAS:
            if all(0 < alpha + beta * keys <= keys for keys in lengths):
                windows = tuple(window((alpha, beta), keys, block) for keys in lengths)
                found.setdefault(windows, (alpha, beta))
    return list(found.values())


def costs_of(distances: Tensor, rules: Sequence[Rule], keys: int, block: int) -> Tensor:
    """(heads, rules): the influence that lies beyond each rule's window."""
    within = torch.nn.functional.pad(distances.double().cumsum(-1), (1, 0))
    beyond = within[:, -1:] - within
    reach = [min(window(rule, keys, block), distances.shape[1]) for rule in rules]
    return beyond[:, reach].clamp(min=0)


def plan_of(
    observed: Mapping[int, Sequence[tuple[int, Tensor]]],
    density: float,
    block: int,
    step: int,
    rules_a_layer: int,
) -> Plan:
    """The plan that loses least on the longest prompts, of those that are best on the others.

    observed: by layer, the length and the influence by distance (heads, blocks) of each prompt.
    """
    layers = [_by_length(observed[layer]) for layer in sorted(observed)]
    lengths = sorted(layers[0])
    if len(lengths) > _MOST_LENGTHS:
        raise UsageError(
            f"the prompts have {len(lengths)} lengths; MoA plans for {_MOST_LENGTHS} at most, each "
            "a separate aim: cut them to a few"
        )
    planned = lengths[:-1] or lengths
    held = [*lengths, 2 * planned[-1]]
    rules = rules_for(held, block, step)
    shares = torch.tensor([[share(rule, keys, block) for rule in rules] for keys in held])
    costs = {
        keys: torch.cat([costs_of(layer[keys], rules, keys, block) for layer in layers])
        for keys in lengths
    }
    heads = layers[0][lengths[0]].shape[0]
    asked = Question(
        torch.stack([costs[keys] for keys in planned]), shares, density, heads, rules_a_layer
    )
    front = fronts(asked)
    last = costs[lengths[-1]]
    best = min(front, key=lambda chosen: float(last.gather(1, chosen.unsqueeze(1)).sum()))
    chosen = best.reshape(len(layers), heads).tolist()
    return Plan(block, tuple(tuple(rules[index] for index in layer) for layer in chosen))


def _by_length(seen: Sequence[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """The mean influence of the prompts of each length."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    for keys, distances in seen:
        found[keys].append(distances)
    return {keys: torch.stack(parts).double().mean(0) for keys, parts in found.items()}
