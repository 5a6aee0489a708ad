"""True sparse training of an MLP 3072-4096-4096-10 at 95% sparsity against dense autograd.

Run: python benchmarks/cases/true_sparse_mlp.py [times memory agreement static set rigl].
Writes benchmarks/results/true_sparse_mlp.json: step times in one process, in turns; peak memory of each variant in a process of its own; losses against
the masked simulation on the same topology; accuracy of both on Fashion-MNIST (Debian's package
dataset-fashion-mnist) over three seeds.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.bench.measure import interleaved
from gossamer.nn import SparseLinear
from gossamer.nn.kernel_choice.machine import machine

ROOT = Path(__file__).resolve().parents[2]
FASHION = Path("/usr/share/datasets/fashion-mnist")
SIZES, SMALL, BATCH, DENSITY = (3072, 4096, 4096, 10), (784, 1024, 1024, 10), 128, 0.05
LAYERS = ("0", "2", "4")


def stack(layers: list[nn.Module]) -> nn.Sequential:
    """ReLU between."""
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def sparse(sizes: tuple[int, ...], density: float, seed: int = 0) -> nn.Sequential:
    """Kept weights only, from the start."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [SparseLinear.random(a, b, density, generator=generator) for a, b in pairwise(sizes)]
    return stack(drawn)


def dense(sizes: tuple[int, ...]) -> nn.Sequential:
    """torch's layers."""
    return stack([nn.Linear(a, b) for a, b in pairwise(sizes)])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """In one compiled pass over the parameters, the fastest that torch has on a CPU."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """A whole training step; its loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def batch(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, width, generator=generator)
    return x, torch.randint(10, (BATCH,), generator=generator)


def times() -> dict[str, float]:
    """Milliseconds of a step, and of one that rewires all layers, beyond an ordinary one."""
    x, y = batch(SIZES[0])
    models = {"sparse": sparse(SIZES, DENSITY), "dense": dense(SIZES)}
    variants = {name: (model, adamw(model), x, y) for name, model in models.items()}
    calls = {name: (lambda variant=variant: step(*variant)) for name, variant in variants.items()}
    found = {name: 1e3 * taken for name, taken in interleaved(calls, 9).items()}
    for method in (gs.weights.SET(DENSITY, every=1), gs.weights.RigL(DENSITY, every=1, until=1.0)):
        with gs.true_sparse_training(*variants["sparse"][:2], method, total_steps=100):
            taken = []
            for _ in range(4):
                start = time.perf_counter()
                step(*variants["sparse"])
                taken.append(time.perf_counter() - start)
        found[f"rewiring, {method.card.name}"] = 1e3 * sorted(taken)[1] - found["sparse"]
    return found


def peak_bytes() -> int:
    """The most that this program held so far; getrusage would count the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory(variant: str, density: float) -> dict[str, int]:
    """In this process: bytes that building and three steps add at the most, and what is held."""
    x, y = batch(SIZES[0])
    step(*(lambda m: (m, adamw(m)))(stack([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)])),
         x[:, :8], y)  # fmt: skip
    before = peak_bytes()
    model = dense(SIZES) if variant == "dense" else sparse(SIZES, density)
    optimizer = adamw(model)
    if variant == "rigl":
        method = gs.weights.RigL(density, every=1)
        with gs.true_sparse_training(model, optimizer, method, total_steps=100):
            [step(model, optimizer, x, y) for _ in range(3)]
    else:
        [step(model, optimizer, x, y) for _ in range(3)]
    peak = peak_bytes() - before
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "peak_bytes": peak,
        "parameters_bytes": sum(p.nbytes for p in model.parameters()),
        "gradients_bytes": sum(g.nbytes for g in grads),
        "state_bytes": sum(t.nbytes for t in state),
        "index_bytes": sum(b.nbytes for b in model.buffers()),
    }


def masked_twin(model: nn.Sequential, method: object) -> nn.Sequential:
    """A dense model with the same weights; the method will start from the same topology."""
    sizes = (model[0].in_features, *(model[int(n)].out_features for n in LAYERS))
    twin, masks = dense(sizes), {}
    with torch.no_grad():
        for name in LAYERS:
            ours, theirs = model.get_submodule(name), twin.get_submodule(name)
            theirs.weight.copy_(ours.to_matrix())
            theirs.bias.copy_(ours.bias)
            flat = torch.zeros(theirs.weight.numel(), dtype=torch.bool)
            masks[name] = flat.index_fill(0, ours.positions, True).view_as(theirs.weight)
    object.__setattr__(method, "start", lambda *_: masks)
    return twin


def both(
    model: nn.Sequential, method: object, total: int, data: object, seed: int, make=adamw
) -> object:
    """Losses by step of the true sparse run and of the masked one, the masked model, its masks."""
    optimizer = make(model)
    twin = masked_twin(model, method)
    other = make(twin)
    with gs.true_sparse_training(model, optimizer, method, total_steps=total, seed=seed):
        ours = [step(model, optimizer, *data(at)) for at in range(total)]
    with gs.sparse_training(
        twin, other, method, total_steps=total, include=LAYERS, seed=seed
    ) as run:
        theirs = [step(twin, other, *data(at)) for at in range(total)]
    return ours, theirs, twin, run.masks


def agreement() -> dict[str, float]:
    """Largest difference of the losses of 8 steps, RigL rewiring after the third and the sixth.

    With SGD: Adam's first steps are the learning rate in size, so that among weights just grown
    rounding decides which is smallest.
    """
    method = gs.weights.RigL(DENSITY, every=3, until=1.0)
    model = sparse(SIZES, DENSITY)
    ours, theirs, _, masks = both(model, method, 8, lambda at: batch(SIZES[0], at % 3), 0, sgd)
    shared = sum(
        int(masks[name].reshape(-1)[model.get_submodule(name).positions].sum()) for name in LAYERS
    )
    return {
        "steps": len(ours),
        "losses": ours,
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "kept": sum(int(mask.sum()) for mask in masks.values()),
        "kept_by_both": shared,
    }


def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 784) of mean 0 and spread 1, and labels."""
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        raw = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8)
    return (raw.view(-1, 784).float() / 255 - 0.286) / 0.353, labels.long()


def accuracy(name: str, seeds: range, epochs: int) -> dict[str, object]:
    """Test accuracy on Fashion-MNIST of both runs by seed, same start and order."""
    train, test = fashion("train"), fashion("t10k")
    steps = len(train[1]) // BATCH
    rows = {"true_sparse": [], "masked": []}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = [
            rows
            for _ in range(epochs)
            for rows in torch.randperm(len(train[1]), generator=generator).split(BATCH)[:steps]
        ]
        method = {
            "static": lambda: gs.weights.StaticRandom(DENSITY),
            "set": lambda: gs.weights.SET(DENSITY, every=100),
            "rigl": lambda: gs.weights.RigL(DENSITY, every=100),
        }[name]()
        model = sparse(SMALL, DENSITY, seed)
        data = [(train[0][taken], train[1][taken]) for taken in order]
        _, _, twin, _ = both(model, method, len(order), data.__getitem__, seed)
        for key, net in (("true_sparse", model), ("masked", twin)):
            with torch.no_grad():
                right = (net(test[0]).argmax(1) == test[1]).double().mean()
            rows[key].append(float(right))
    difference = torch.tensor(rows["true_sparse"]) - torch.tensor(rows["masked"])
    spread = torch.tensor(rows["masked"]).std()
    return {**rows, "mean_difference": float(difference.mean()), "spread_over_seeds": float(spread)}


def apart(variant: str, density: float) -> dict[str, int]:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "variant", variant, str(density)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure everything and write it."""
    if sys.argv[1:2] == ["variant"]:
        print(json.dumps(memory(sys.argv[2], float(sys.argv[3]))))
        return
    out = ROOT / "benchmarks" / "results" / "true_sparse_mlp.json"
    record = json.loads(out.read_text()) if out.exists() else {}
    parts = sys.argv[1:] or ["times", "memory", "agreement", "static", "set", "rigl"]
    record["case"] = {"sizes": SIZES, "density": DENSITY, "batch": BATCH, "optimizer": "AdamW",
                      "machine": machine()}  # fmt: skip
    if "times" in parts:
        found = times()
        record["milliseconds"], record["ratio"] = found, found["dense"] / found["sparse"]
    if "memory" in parts:
        variants = [("dense", 1.0), *(("sparse", d) for d in (0.1, 0.05, 0.025)), ("rigl", DENSITY)]
        record["memory"] = {
            f"{variant}, density {d:g}": apart(variant, d) for variant, d in variants
        }
    if "agreement" in parts:
        record["agreement"] = agreement()
    fashion_mnist = record.setdefault("fashion_mnist", {})
    fashion_mnist.update(sizes=SMALL, epochs=1)
    for name in ("static", "set", "rigl"):
        if name in parts:
            fashion_mnist[name] = accuracy(name, range(3), 1)
    print(json.dumps(record, indent=1), file=sys.stderr)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
