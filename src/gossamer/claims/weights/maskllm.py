"""MaskLLM on the bundled byte-level model: do learned 2:4 masks beat those of one shot?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.testbed import calibration_batches, heldout_text, language_model

TWO_OF_FOUR = gs.NM(2, 4)
WINDOWS, LENGTH, BATCH, HELD_OUT = 1024, 256, 2, 20_000
"""Windows that every method reads once, their bytes, windows per step, bytes measured on."""
ONE_SHOT = {
    "magnitude": gs.weights.Magnitude(),
    "Wanda": gs.weights.Wanda(),
    "SparseGPT": gs.weights.SparseGPT(),
}


def learn(
    model: nn.Module, method: gs.weights.MaskLLM, data: list[dict[str, Tensor]], **how: Any
) -> tuple[Mapping[str, gs.Support], float]:
    """Train the masks, one step a batch; their supports, and how often a sample is the likeliest
    pattern in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.rate, betas=(0.9, 0.95))
    model.train()
    with gs.sparse_training(model, optimizer, method, total_steps=len(data), **how) as run:
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t / len(data)))
        )
        for batch in data:
            ids = batch["input_ids"]
            optimizer.zero_grad()
            logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            rate.step()
        chance = likeliest(model, run.supports)
    model.eval()
    return run.supports, chance


@torch.no_grad()
def likeliest(model: nn.Module, names: Mapping[str, Any]) -> float:
    """The mean over all groups. With Gumbel noise a pattern is drawn with the softmax of its
    scaled logit, whatever the temperature."""
    total = count = 0.0
    for name in names:
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        mask: Any = layer.parametrizations.weight[0].mask
        chances = (mask.now[1] * mask.logits).softmax(dim=1).amax(dim=1)
        total, count = total + float(chances.sum()), count + len(chances)
    return total / count


def left(supports: Mapping[str, gs.Support], prior: Mapping[str, gs.Support]) -> float:
    """The share of groups of four whose pattern is not that of the prior."""
    moved = count = 0
    for name, support in supports.items():
        other = (support.mask != prior[name].mask).reshape(-1, 4).any(dim=1)
        moved, count = moved + int(other.sum()), count + len(other)
    return moved / count


def changed(model: nn.Module, supports: Mapping[str, gs.Support]) -> float:
    """How many kept weights are not, bit by bit, those of the model as it came."""
    before = dict(language_model().named_modules())
    return float(
        sum(
            int((layer.weight != before[name].weight)[supports[name].mask].sum())
            for name, layer in model.named_modules()
            if name in supports
        )
    )


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits per byte of each method. The short form prunes the last block with 8 windows."""
    windows, held_out = (8, 2_000) if short else (WINDOWS, HELD_OUT)
    how: dict[str, Any] = {"exclude": ["model.layers.[0-3].*"] if short else []}
    data = calibration_batches(windows, LENGTH, BATCH, seed)
    text = heldout_text()[:held_out]
    found = {"dense": bits_per_byte(language_model(), text)}
    for name, method in ONE_SHOT.items():
        result = gs.prune(language_model(), method, pattern=TWO_OF_FOUR, data=data, **how)
        found[name] = bits_per_byte(result.model, text)
        prior = result.supports  # at last that of SparseGPT, as in the paper
    for name, method in (
        ("MaskLLM", gs.weights.MaskLLM(prior=prior)),
        ("MaskLLM without prior", gs.weights.MaskLLM(strength=0.0)),
    ):
        model = language_model()
        supports, chance = learn(model, method, data, seed=seed, **how)
        found[name] = bits_per_byte(model, text)
        if name == "MaskLLM":
            found |= {
                "groups that left the prior": left(supports, prior),
                "chance of the likeliest pattern": chance,
                "kept weights that changed": changed(model, supports),
            }
    return found


def promises(found: Figures) -> list[Promise]:
    """What the masks do, and their bits against one shot."""
    mine = found["MaskLLM"]
    return [
        promise(
            "no kept weight changes",
            "mechanism",
            [1.0 - x for x in found["kept weights that changed"]],
        ),
        promise(
            "more than 1% of groups leave the prior",
            "mechanism",
            found["groups that left the prior"],
            0.01,
        ),
        promise(
            "in the end a sample is the likeliest pattern in more than 9 of 10 groups",
            "mechanism",
            found["chance of the likeliest pattern"],
            0.9,
        ),
        *(
            promise(f"fewer bits than {name}", "quality", found[name], mine)
            for name in reversed(ONE_SHOT)
        ),
        promise("fewer bits than without a prior", "quality", found["MaskLLM without prior"], mine),
    ]


CLAIM = Claim(
    gs.weights.MaskLLM,
    "Masks learned at 2:4 over frozen weights are far better than those of one shot, and beginning "
    "near the mask of SparseGPT helps.",
    f"The bundled byte-level model, all linear layers of its blocks at 2:4. Each method reads the "
    f"same {WINDOWS} windows of {LENGTH} bytes from its training text; MaskLLM learns by "
    f"{WINDOWS // BATCH} steps over them. Bits per byte on {HELD_OUT // 1000} kB of held-out text.",
    one,
    promises,
    looks=(3,),
    remark="The paper learns from 2 billion tokens, and its one-shot methods read far fewer; here "
    "each window is read once by all, so that the data are equal. Each group of four weights costs "
    "six logits, so SmolLM2 is too large for this.",
)
