"""Trains the bundled model of symbols; run as `python -m gossamer.testbed.train_symbols --help`.

A small Llama with grouped queries on the language of `gossamer.testbed.symbols`. Prompts grow from
48 to 1024 symbols. A stage ends when the answers of its last steps are right, or at its limit.
Reproducible from `--seed` on the same machine and versions. The bundled weights are not one such
run: words were counted from 1 to 8 in the first 350 steps, one stage ran partly at another length,
and the last stage began without the optimizer's state. A checkpoint is kept while it trains: a run
that was killed goes on from there when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.files import write_whole
from gossamer.testbed import symbols
from gossamer.testbed.language import llama
from gossamer.testbed.symbols import IGNORED, Content, SymbolTask

WARM_UP, SAVE_EVERY, WINDOW, ENOUGH = 50, 10, 25, 0.94
THETA = 1e6
"""Of the rotation: half of each head turns so slowly that it compares symbols across a prompt."""
WIDTH = 128


@dataclass(frozen=True)
class Stage:
    """Prompts of one length, or of several in turns, of about as many symbols in a step.

    lengths: of the prompts. batch: prompts of the longest. most: steps, of which `least` are taken
    in any case. rate: of learning. falls: whether it falls to nothing.
    """

    lengths: tuple[int, ...]
    batch: int
    most: int
    least: int = 60
    rate: float = 2e-3
    falls: bool = False


STAGES = (
    Stage((48,), 32, 2000),
    Stage((128,), 12, 80),
    Stage((320,), 5, 80),
    Stage((1024,), 1, 200, 200, falls=True),
    Stage((256, 512, 1024), 1, 150, 150, 1e-3, falls=True),
)


def build(seed: int) -> nn.Module:
    """The untrained model, float32."""
    torch.manual_seed(seed)
    model = llama(WIDTH, 5 * WIDTH // 2, 5, 4, 2, 2048, 0.05, symbols.SYMBOLS, THETA)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: Any) -> None:
    """Begin with heads that compare each symbol with those before all others.

    Every task needs a head that looks at the symbol before, and heads that look where that symbol
    is the present one. Without them the first thousands of steps go into finding them. Queries and
    keys of the first layer's first head are made of an entry that all embeddings share, a position
    apart. What it finds, a random projection of the symbol before, is what heads of the next three
    layers compare with the same projection of the present symbol, in the slowest of the rotation.
    """
    layers = [layer.self_attn for layer in model.model.layers]
    size, width = layers[0].head_dim, model.config.hidden_size
    half, pairs = size // 2, size // 4
    angle = model.model.rotary_emb.inv_freq[:pairs]
    model.model.embed_tokens.weight *= 10  # or the first layer would drown them
    model.model.embed_tokens.weight[:, 0] = 2.0
    read, write = (torch.nn.init.orthogonal_(torch.empty(size, width)) for _ in range(2))
    first = layers[0]
    first.q_proj.weight[:size] *= 0.1
    first.k_proj.weight[:size] *= 0.1
    first.q_proj.weight[:pairs, 0] = 1.5
    first.k_proj.weight[:pairs, 0] = 1.5 * angle.cos()
    first.k_proj.weight[half : half + pairs, 0] = 1.5 * angle.sin()
    first.v_proj.weight[:size] = read
    first.o_proj.weight[:, :size] = 0.5 * write.T
    slow = torch.cat([torch.arange(pairs, half), torch.arange(half + pairs, size)])
    for layer in layers[1:4]:
        for group in range(2):
            code = torch.arange(group * half, (group + 1) * half)
            layer.q_proj.weight[2 * group * size + slow] = 1.5 * read[code]
            layer.k_proj.weight[group * size + slow] = 1.5 * write[code]


def content(length: int, rng: random.Random) -> Content:
    """Random chains, words and questions, as many as leave half of a short prompt."""
    room = length - 1
    hops: list[int] = []
    counts: list[int] = []
    while len(counts) < len(symbols.WORDS):
        chain, count = rng.choice((0, 0, 1, 2)), rng.choice(symbols.COUNTS)
        cost = 3 * (chain + 2) + count + 3
        names = sum(hops) + len(hops) + chain + 1
        if cost > room or names > len(symbols.NAMES):
            break
        room -= cost
        hops.append(chain)
        counts.append(count)
    return Content(tuple(hops), tuple(counts), len(hops) + len(counts))


def batch(stage: Stage, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, answers and known values, int64 (batch, length)."""
    rng = random.Random(seed)
    length = stage.lengths[seed % len(stage.lengths)]
    made = [
        symbols.prompt(length, content(length, rng), rng)
        for _ in range(stage.batch * max(stage.lengths) // length)
    ]
    ids, answers, known = (
        torch.tensor([getattr(one, name) for one in made]) for name in ("ids", "answers", "known")
    )
    return ids, answers, known


@dataclass
class Run:
    """How far a run is; all of it is in the checkpoint."""

    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    """Shares of right answers of the stage's last steps."""


def train(seed: int, checkpoint: Path, stages: tuple[Stage, ...] = STAGES) -> tuple[nn.Module, Run]:
    """The trained model, and what it took; progress goes to stderr."""
    model = build(seed)
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    run = _resume(checkpoint, model, adam)
    while run.stage < len(stages):
        stage = stages[run.stage]
        while run.step < stage.most:
            start = time.monotonic()
            for group in adam.param_groups:
                falling = 1 - run.step / stage.most if stage.falls else 1.0
                group["lr"] = stage.rate * min(1.0, (run.total + 1) / WARM_UP) * falling
            found = _step(model, adam, batch(stage, 1_000_003 * seed + run.total))
            run.recent = [*run.recent, found][-WINDOW:]
            run.step, run.total = run.step + 1, run.total + 1
            run.seconds += time.monotonic() - start
            if run.total % SAVE_EVERY == 0:
                share = sum(run.recent) / len(run.recent)
                print(f"{max(stage.lengths)} symbols, step {run.step} of {stage.most}: "
                      f"{share:.3f} right, {run.seconds:.0f} s", file=sys.stderr)  # fmt: skip
                _save(checkpoint, model, adam, run)
            full = len(run.recent) == WINDOW and run.step >= stage.least
            if full and sum(run.recent) / WINDOW > ENOUGH:
                break
        run.stage, run.step, run.recent = run.stage + 1, 0, []
    return model.eval(), run


def _step(
    model: nn.Module, adam: torch.optim.Optimizer, made: tuple[Tensor, Tensor, Tensor]
) -> float:
    """One step; the share of right answers before it."""
    ids, answers, known = made
    logits = model(input_ids=ids, use_cache=False).logits.float()
    nn.functional.cross_entropy(
        logits.flatten(0, 1), known.flatten(), ignore_index=IGNORED
    ).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    good, count = symbols.right(logits.detach(), answers)
    return good / count


def _save(path: Path, model: nn.Module, adam: torch.optim.Optimizer, run: Run) -> None:
    state = {"run": vars(run), "model": model.state_dict(), "adam": adam.state_dict()}
    write_whole(path, lambda place: torch.save(state, place))


def _resume(path: Path, model: nn.Module, adam: torch.optim.Optimizer) -> Run:
    """Where the run in the checkpoint was; the beginning where there is none."""
    if not path.exists():
        return Run()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    adam.load_state_dict(state["adam"])
    return Run(**state["run"])


def quality(model: nn.Module) -> dict[str, float]:
    """Share of right answers by task and length, on 64 prompts of a seed never trained on."""
    found = {}
    for name in ("needle", "multi-hop", "counting"):
        for length in (512, 1024):
            parts = [symbols.accuracy(model, SymbolTask(name, length), -1 - x) for x in range(8)]
            found[f"{name} {length}"] = sum(parts) / len(parts)
    return found


def main(argv: list[str] | None = None) -> None:
    """Train, then write the model (bfloat16) and what it can do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    model, run = train(args.seed, checkpoint)
    save: Any = model.to(torch.bfloat16).save_pretrained
    save(args.out)
    record = {"seed": args.seed, "parameters": sum(p.numel() for p in model.parameters()),
              "steps": run.total, "seconds": round(run.seconds),
              "threads": torch.get_num_threads(), "quality": quality(model.float())}  # fmt: skip
    (args.out / "train.json").write_text(json.dumps(record, indent=1) + os.linesep)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
