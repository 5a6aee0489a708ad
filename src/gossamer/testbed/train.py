"""Trains the bundled byte-level model; run as `python -m gossamer.testbed.train --help`.

A Llama architecture of 3.8 million parameters on Python's documentation and standard library, by
Muon for the matrices inside blocks and AdamW for the rest. Reproducible from `--seed` with
`--steps` on the same machine and versions. `--minutes` spends wall-clock time instead: the decay
of the learning rate then follows the clock, and train.json records the steps done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import MissingExtra
from gossamer.testbed import corpus

CONTEXT, BATCH = 256, 16
MUON_RATE, ADAM_RATE = 0.02, 3e-3
DOCS = "/usr/share/doc/python3.11/html/_sources"


def build() -> nn.Module:
    """The untrained model, float32."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside blocks, AdamW for embedding, head and norms."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    muon = torch.optim.Muon(
        inner, lr=MUON_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(outer, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def rate(step: int, progress: float) -> float:
    """Share of the peak learning rate: 50 steps of warm-up, then down to 0 in the second half."""
    return min(1.0, (step + 1) / 50) * min(1.0, (1.0 - progress) / 0.5)


def windows(text: np.ndarray, generator: np.random.Generator) -> Tensor:
    """int64 (BATCH, CONTEXT + 1) random windows of the text."""
    starts = generator.integers(0, len(text) - CONTEXT - 1, BATCH)
    return torch.from_numpy(np.stack([text[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))


def train(
    text: bytes, steps: int | None, minutes: float, seed: int, device: str
) -> tuple[nn.Module, int]:
    """The trained model on the CPU and its steps; progress goes to stderr."""
    torch.manual_seed(seed)
    data, generator = np.frombuffer(text, dtype=np.uint8), np.random.default_rng(seed)
    model = build().to(device)
    parts = optimizers(model)
    peaks = [MUON_RATE, ADAM_RATE]
    start, step = time.monotonic(), 0
    while True:
        spent = (time.monotonic() - start) / (60 * minutes)
        progress = step / steps if steps else spent
        if progress >= 1.0:
            break
        for part, peak in zip(parts, peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * rate(step, progress)
        rows = windows(data, generator).to(device)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, 256), rows[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            bits = loss.item() / math.log(2)
            print(f"step {step} ({progress:.0%}): {bits:.3f} bits per byte", file=sys.stderr)
    return model.cpu(), step


def main(argv: list[str] | None = None) -> None:
    """Train, then write the model (bfloat16), the held-out and the calibration text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path(DOCS))
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, help="exact number of steps; else --minutes")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    files = corpus.read(args.docs, args.stdlib)
    text, _ = corpus.split(files)
    model, steps = train(text, args.steps, args.minutes, args.seed, args.device)
    write(model, files, args.out, {"seed": args.seed, "steps": steps})


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
