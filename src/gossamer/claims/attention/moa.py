"""MoA on the bundled language model: planned windows against one window for all heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import gossamer as gs
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.core.attention import AttentionCall
from gossamer.core.text import token_ids, windows
from gossamer.methods.attention.moa import removal
from gossamer.methods.attention.moa_plan import Plan
from gossamer.testbed import calibration_text, heldout_text, language_model

DENSITY, BLOCK, STEP = 0.35, 8, 16
LENGTHS = (48, 112, 192)
"""Prompts that plans are made for, and the last that chooses; answers of 32 come behind."""
PLANNED, LONGER = 144, 256
"""Tokens of the texts that are measured: as planned for, and longer than any that was seen. The
model was trained on texts of 256."""


def plan(seed: int, prompts: int) -> Plan:
    """The plan from calibration text."""
    method = gs.attention.MoA(DENSITY, BLOCK, STEP)
    ids = token_ids(None, calibration_text())
    data = [windows(ids, prompts, length, 31 * seed + length) for length in LENGTHS]
    found = gs.calibrate_attention(language_model(), method, data).plan
    assert isinstance(found, Plan)
    return found


def uniform(like: Plan, tokens: int) -> Plan:
    """The least window that keeps no fewer keys of so many tokens, the same for all heads."""
    blocks = -(-tokens // BLOCK)
    count = math.ceil(like.density(tokens) * blocks - 1e-9) - 1
    return Plan(BLOCK, tuple(tuple((count * BLOCK, 0.0) for _ in layer) for layer in like.rules))


@torch.no_grad()
def bits(method: Plan | None, tokens: int, seed: int, texts: int) -> tuple[float, float]:
    """Bits per byte of held-out text behind its first quarter, and the density of pairs."""
    model = language_model()
    ids = windows(token_ids(None, heldout_text()), texts, tokens, 77 * seed)
    density = 1.0
    if method is None:
        logits = model(ids).logits
    else:
        with gs.sparse_attention(model, gs.attention.MoA(plan=method), dense_below=0) as run:
            logits = model(ids).logits
        density = run.result.density or 1.0
    late = tokens // 4
    loss = torch.nn.functional.cross_entropy(
        logits[:, late:-1].flatten(0, 1), ids[:, late + 1 :].flatten()
    )
    return float(loss) / math.log(2), density


def removed(seed: int) -> float:
    """The largest difference between influences and what the removal of a pair changes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    call = AttentionCall(normal(1, 1, 24, 8), normal(1, 1, 24, 8), normal(1, 1, 24, 8), 1.0, True)
    slopes = normal(1, 1, 24, 8) @ call.value.transpose(-1, -2)
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    logits = (call.query @ call.key.transpose(-1, -2)).masked_fill(later, -torch.inf)
    weights = logits.softmax(-1)
    found, worst = removal(weights, slopes), 0.0
    for row in range(1, 24):
        for column in range(row + 1):
            without = logits[0, 0, row].clone()
            without[column] = -torch.inf
            change = (slopes[0, 0, row] * (without.softmax(-1) - weights[0, 0, row])).sum()
            worst = max(worst, float((found[0, 0, row, column] - change).abs()))
    return worst


def one(seed: int, short: bool) -> dict[str, float]:
    """Bits and densities of the plan, of one window for all, and of dense attention."""
    planned = plan(seed, 1 if short else 8)
    texts = 2 if short else 24
    found = {"error of influences": removed(seed)}
    for name, tokens in (("as planned", PLANNED), ("longer", LONGER)):
        found[f"bits, dense, {name}"] = bits(None, tokens, seed, texts)[0]
        for way, method in (("plan", planned), ("one window", uniform(planned, tokens))):
            measured, density = bits(method, tokens, seed, texts)
            found |= {f"bits, {way}, {name}": measured, f"pairs, {way}, {name}": density}
            found[f"keys, {way}, {name}"] = method.density(tokens)
    betas = [beta for layer in planned.rules for _, beta in layer]
    return found | {"heads whose window grows": sum(beta > 0 for beta in betas) / len(betas)}


def promises(found: Figures) -> list[Promise]:
    """Influences, densities, and bits against one window for all heads."""
    lines = [
        promise(
            "an influence is what a removal changes, to 1e-9",
            "mechanism",
            [1e-9] * len(found["error of influences"]),
            found["error of influences"],
        ),
        promise(
            f"no plan keeps more than {DENSITY:.0%} of the keys at the planned length",
            "mechanism",
            [0.5 - (kept > DENSITY + 1e-9) for kept in found["keys, plan, as planned"]],
        ),
    ]
    lines += [
        promise(
            f"fewer bits than one window of no fewer keys, texts {name}",
            "quality",
            found[f"bits, one window, {name}"],
            found[f"bits, plan, {name}"],
        )
        for name in ("as planned", "longer")
    ]
    return [
        *lines,
        Promise(
            "3.9 times the effective context, and 1.5 to 7.1 times the retrieval accuracy",
            "quality",
            reason="the bundled model was trained on texts of 256 bytes and retrieves nothing",
        ),
    ]


CLAIM = Claim(
    gs.attention.MoA,
    "At half the density, windows planned for each head reach 3.9 times the context of uniform ones, "
    "and extend to lengths that were not profiled.",
    "The bundled model of bytes: 5 layers, 2 heads of keys each, blocks of 8 bytes. Plans from 8 "
    f"prompts of each of {LENGTHS} bytes with answers of 32, at {DENSITY:.0%} of the keys. Bits per "
    f"byte of 24 held-out texts of {PLANNED} and of {LONGER} bytes, behind their first quarter.",
    one,
    promises,
    remark="One window for all heads keeps the first block too, and no fewer keys than the plan. "
    "Seeds vary calibration prompts and held-out texts. The model was trained on 256 bytes, so nothing "
    "longer is tried.",
)
