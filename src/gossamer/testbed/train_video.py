"""Trains the bundled video transformer; run as `python -m gossamer.testbed.train_video --help`.

By AdamW on shapes drawn anew in every step, first on frames of 16 x 16 pixels, then on 32 x 32. The
weights that are written are an average over the last steps. A checkpoint is kept in `--out` while
it trains: a run that was killed goes on from there when started again.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from gossamer.core.files import write_whole
from gossamer.testbed.video import SIZE, WORDS, VideoTransformer, loss, videos

PEAK_RATE, WARM_UP, SAVE_EVERY, WITHOUT_WORDS = 3e-3, 50, 50, 0.1
SMALL = 16
BATCH = {SMALL: 8, SIZE: 3}


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then down in a straight line, to 0.1."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)


def batch_loss(model: nn.Module, step: int, size: int) -> torch.Tensor:
    """The loss on the videos of a step, at times that prefer the middle."""
    generator = torch.Generator().manual_seed(step)
    video, words = videos(BATCH[size], generator, size=size)
    noise = torch.randn(video.shape, generator=generator)
    moment = torch.sigmoid(torch.randn(len(video), generator=generator) + 0.3)
    dropped = torch.rand(len(video), 1, generator=generator) < WITHOUT_WORDS
    words = torch.where(dropped, torch.tensor(WORDS), words)
    return loss(model, video, words, noise, moment)


def train(small: int, large: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights; progress goes to stderr."""
    torch.manual_seed(0)
    model, steps = VideoTransformer(), small + large
    adam = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    average = {name: x.clone() for name, x in model.state_dict().items()}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        average, first = state["average"], state["step"]
    began, sums = time.time(), 0.0
    for step in range(first, steps):
        for group in adam.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            found = batch_loss(model, step, SMALL if step < small else SIZE)
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        keep = min(0.98, (step + 1) / (step + 10))
        for name, x in model.state_dict().items():
            average[name].lerp_(x, 1 - keep)
        sums += found.item()
        if (step + 1) % SAVE_EVERY == 0:
            seconds = time.time() - began
            print(f"step {step + 1} of {steps}: {sums / SAVE_EVERY:.4f}, {seconds:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            sums = 0.0
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "step": step + 1,
                     "average": average}  # fmt: skip
            write_whole(checkpoint, partial(torch.save, state))
    return average


def main(argv: list[str] | None = None) -> None:
    """Train, then write video.safetensors in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--small", type=int, default=800, help="steps on small frames")
    parser.add_argument("--large", type=int, default=100, help="steps on whole frames")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found = train(args.small, args.large, args.out / "checkpoint.pt")
    halves = {name: x.to(torch.bfloat16).contiguous() for name, x in found.items()}
    data = save(halves)
    write_whole(args.out / "video.safetensors", lambda place: place.write_bytes(data))


if __name__ == "__main__":
    main()
