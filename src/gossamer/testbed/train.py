"""Trains the bundled byte-level model; run as `python -m gossamer.testbed.train --help`.

A Llama architecture of 3.8 million parameters on Python's documentation and standard library, by
AdamW. Reproducible from `--seed` on the same machine and versions; the bundled weights come from
the same recipe on other random windows. A checkpoint is kept in `--out` while it trains: a run that
was killed goes on from there when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.files import write_whole
from gossamer.core.text import next_token_loss, windows
from gossamer.testbed import corpus
from gossamer.testbed.language import llama

CONTEXT, BATCH = 256, 16
PEAK_RATE, WARM_UP, SAVE_EVERY = 2e-3, 100, 200
DOCS = "/usr/share/doc/python3.11/html/_sources"


def build() -> nn.Module:
    """The untrained model, float32."""
    return llama(width=256, neurons=704, blocks=5, heads=4, groups=2, positions=512)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices inside blocks only."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    groups = [{"params": inner, "weight_decay": 0.1}, {"params": outer, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then down to 0 in the second half."""
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, (steps - step) / (0.5 * steps))


def train(
    text: bytes, steps: int, seed: int, device: str, checkpoint: Path, compiled: bool
) -> nn.Module:
    """The trained model on the CPU; progress goes to stderr."""
    torch.manual_seed(seed)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    model = build().to(device)
    adam = optimizer(model)
    first = _resume(checkpoint, model, adam, (steps, seed))
    forward: Any = torch.compile(model) if compiled else model
    for step in range(first, steps):
        for group in adam.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        rows = windows(ids, BATCH, CONTEXT, seed * 1_000_003 + step, ahead=1).to(device)
        loss = next_token_loss(forward, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            bits = loss.item() / math.log(2)
            print(f"step {step + 1} of {steps}: {bits:.3f} bits per byte", file=sys.stderr)
        if (step + 1) % SAVE_EVERY == 0:
            _save(checkpoint, step + 1, model, adam, (steps, seed))
    return model.cpu()


def _save(
    path: Path, step: int, model: nn.Module, adam: torch.optim.Optimizer, run: tuple[int, int]
) -> None:
    """Everything that the next step depends on."""
    state = {"step": step, "model": model.state_dict(), "adam": adam.state_dict(), "run": run}
    write_whole(path, lambda place: torch.save(state, place))


def _resume(path: Path, model: nn.Module, adam: torch.optim.Optimizer, run: tuple[int, int]) -> int:
    """Steps already done by the same run (steps, seed); 0 when there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if tuple(state["run"]) != run:
        raise SystemExit(f"{path} belongs to a run with other --steps or --seed: remove it")
    model.load_state_dict(state["model"])
    adam.load_state_dict(state["adam"])
    return int(state["step"])


def main(argv: list[str] | None = None) -> None:
    """Train, then write the model (bfloat16), the held-out and the calibration text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path(DOCS))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=5000, help="default: 5000, an hour or two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a third faster")
    args = parser.parse_args(argv)
    files = corpus.read(args.docs, args.stdlib)
    text, _ = corpus.split(files)
    checkpoint = args.out / "checkpoint.pt"
    model = train(text, args.steps, args.seed, args.device, checkpoint, args.compile)
    write(model, files, args.out, {"seed": args.seed, "steps": args.steps})
    checkpoint.unlink(missing_ok=True)


def write(model: nn.Module, files: dict[str, bytes], out: Path, facts: dict[str, int]) -> None:
    """The folder that is shipped as package data."""
    out.mkdir(parents=True, exist_ok=True)
    save: Any = model.to(torch.bfloat16).save_pretrained
    save(out / "lm")
    (out / "heldout.txt").write_bytes(corpus.excerpt(files, True, 200_000, 20_000))
    (out / "calibration.txt").write_bytes(corpus.excerpt(files, False, 400_000, 8_000))
    record = {**facts, "tokens_seen": facts["steps"] * BATCH * CONTEXT}
    record["training_bytes"] = len(corpus.split(files)[0])
    (out / "train.json").write_text(json.dumps(record, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
