"""Light Forcing: is the budget spent to the last operation, does it help that errors of early chunks
are handed on, and is a frame far back found?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import gossamer as gs
from gossamer.claims.diffusion import WIDTH, call_of, off
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import DenoisingStep
from gossamer.methods.attention.light_forcing import LightForcing
from gossamer.methods.attention.steps import dense

GRID = gs.TokenGrid(2, 4, 8)
CHUNKS, BLOCK = 6, 16
METHOD = LightForcing(0.3, 0.1, chunks=CHUNKS, frames=4, block=BLOCK)
STEP = DenoisingStep(0, 1, "", GRID)


def rolled_out(seed: int, method: LightForcing | None) -> list[Tensor]:
    """Chunks of a toy model, each made by attention from the ones before and new noise.

    What a chunk gets wrong is in the keys of all that follow.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    place = alike(GRID.tokens, generator)
    past: list[Tensor] = []
    for _ in range(CHUNKS):
        own = alike(GRID.tokens, generator)
        tokens = torch.cat([*past, own + place])
        query, key = (own + place) @ maps[0], tokens @ maps[1]
        call = call_of(*(x[None, None] for x in (1.5 * query, 1.5 * key, tokens @ maps[2])))
        if method is None:
            found = dense(call)[0]
        else:
            found = method.attend(call, STEP, None).output
        x = found[0, 0] + 0.3 * own
        past.append(2.2 * x / x.square().mean(-1, keepdim=True).sqrt())
    return past


def alike(tokens: int, generator: torch.Generator) -> Tensor:
    """Tokens (tokens, WIDTH) that are alike within a block."""
    shared = torch.randn(tokens // BLOCK, WIDTH, generator=generator)
    own = torch.randn(tokens, WIDTH, generator=generator)
    return shared.repeat_interleave(BLOCK, dim=0) + 0.3 * own


def needle(seed: int) -> tuple[AttentionCall, int]:
    """A last chunk whose queries all want one frame in the middle of what came before."""
    generator = torch.Generator().manual_seed(seed)
    past = (CHUNKS - 1) * GRID.tokens
    key = torch.randn(past + GRID.tokens, WIDTH, generator=generator)
    value = torch.randn(past + GRID.tokens, WIDTH, generator=generator)
    query = torch.randn(GRID.tokens, WIDTH, generator=generator)
    wanted = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    frame = int(torch.randint(2, past // GRID.frame - 2, (1,), generator=generator))
    key[frame * GRID.frame : (frame + 1) * GRID.frame] += 6 * wanted
    query = query + 6 * wanted
    return call_of(*(x[None, None] for x in (query, key, value))), frame


def one(seed: int, short: bool) -> dict[str, float]:
    """The budget, three schedules on the toy model, and the needle."""
    works = [i + 1.0 for i in range(1, CHUNKS)]
    wanted = METHOD.density * sum(works)
    tight = replace(METHOD, density=0.9)  # early chunks would need more than everything
    found = {
        "budget missed": abs(spending(METHOD, works) - wanted) / wanted,
        "budget missed, with a cut": abs(spending(tight, works) / (0.9 * sum(works)) - 1),
    }
    exact = rolled_out(seed, None)
    for schedule in ("growing", "flat", "shrinking"):
        made = rolled_out(seed, replace(METHOD, schedule=schedule))
        errors = [off(a, b) for a, b in zip(made[1:], exact[1:], strict=True)]
        found[f"mean error, {schedule}"] = sum(errors) / len(errors)
        found[f"last error, {schedule}"] = errors[-1]
    call, frame = needle(seed)
    kept = replace(METHOD, frames=1).choose(call, GRID, 0.2)
    first = frame * GRID.frame // BLOCK
    found["needle found"] = float(kept[..., first : first + GRID.frame // BLOCK].double().mean())
    window = replace(METHOD, frames=0).choose(call, GRID, 0.2)
    found["needle found, window"] = float(
        window[..., first : first + GRID.frame // BLOCK].double().mean()
    )
    return found


def spending(method: LightForcing, works: list[float]) -> float:
    """What the chunks behind the first spend."""
    return sum(w * d for w, d in zip(works, method.densities(GRID), strict=True))


def promises(found: Figures) -> list[Promise]:
    """Counts, the schedule, and the needle."""
    return [
        promise("what is spent is the target to 1e-6", "mechanism",
                [1e-6 - x for x in found["budget missed"]]),
        promise("also where a sparsity was cut", "mechanism",
                [1e-6 - x for x in found["budget missed, with a cut"]]),
        promise("growing sparsity has less error than flat", "quality", found["mean error, flat"],
                found["mean error, growing"]),
        promise("and than shrinking", "quality", found["mean error, shrinking"],
                found["mean error, growing"]),
        promise("a frame far back is found, all of it", "mechanism", found["needle found"], 1.0,
                1e-9),
        promise("which a window misses", "mechanism",
                [0.01 - x for x in found["needle found, window"]]),
        Promise("VBench 84.5 against 84.1 dense", "quality", reason="no Self Forcing 1.3B here"),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.LightForcing,
    "Sparsity that grows from chunk to chunk, and frames before blocks, keep the quality of dense "
    "autoregressive video: VBench 84.5 against 84.1.",
    "A toy process of 6 chunks of 64 tokens whose keys are its own outputs, at a density of 0.3; and "
    "a needle frame.",
    one,
    promises,
)
