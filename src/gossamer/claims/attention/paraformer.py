"""Paraformer on synthetic articles: does sparsemax leave most sentences out and lose nothing?"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

import gossamer as gs
from gossamer.claims.layers import best_rates, fit
from gossamer.claims.ledger import Claim, Figures, Promise, promise
from gossamer.ops.sparsemax import sparsemax

WORDS, SENTENCES, LENGTH, ASKED, WIDTH = 300, 30, 8, 4, 64
WAYS = ("softmax", "sparsemax")
STEPS = 400
SLACK = 0.01
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def articles(count: int, generator: torch.Generator) -> Batch:
    """Vectors of queries, vectors of sentences, labels, and where the relevant sentence stands.

    One sentence has the query's words. Every sentence has one of two words that say yes or no, and
    the label is what the relevant one says. Sentences are bags of words behind a frozen random
    layer.
    """
    words = torch.randint(2, WORDS, (count, SENTENCES, LENGTH), generator=generator)
    words[..., 0] = torch.randint(0, 2, (count, SENTENCES), generator=generator)
    asked = torch.randint(2, WORDS, (count, ASKED), generator=generator)
    place = torch.randint(0, SENTENCES, (count,), generator=generator)
    rows = torch.arange(count)
    words[rows, place, 1 : ASKED + 1] = asked
    frozen = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(1))
    query, sentences = (frozen[x].sum(-2).mul(0.5).tanh() for x in (asked, words))
    label = words[rows, place, 0]
    return F.normalize(query, dim=-1), F.normalize(sentences, dim=-1), label, place


def trained(way: str, seed: int, steps: int, rate: float) -> gs.attention.Paraformer:
    """A head after training on fresh articles."""
    torch.manual_seed(seed)
    layer = gs.attention.Paraformer(WIDTH, weights=way)
    with torch.no_grad():
        layer.ask.weight.copy_(4 * torch.eye(WIDTH))  # vectors have norm 1
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        query, sentences, label, _ = articles(64, generator)
        return F.cross_entropy(layer(query, sentences), label)

    fit(layer.parameters(), loss, steps, rate)
    return layer.eval()


@torch.no_grad()
def measured(layer: gs.attention.Paraformer, seed: int) -> dict[str, float]:
    """F2 on held-out articles, the share of other sentences at 0, and the relevant one's weight."""
    held = articles(2000, torch.Generator().manual_seed(10**6 + seed))
    query, sentences, label, place = held
    said = layer(query, sentences).argmax(1)
    right = float((said * label).sum())
    f2 = 5 * right / max(1.0, 4 * float(label.sum()) + float(said.sum()))
    weights = layer.attention(query, sentences)
    relevant = weights.gather(1, place.unsqueeze(1))
    zeros = (weights == 0).sum(1) / (SENTENCES - 1)
    return {
        "F2": f2, "others at 0": float(zeros.mean()), "weight of the relevant": float(relevant.mean())
    }  # fmt: skip


@cache
def rates(short: bool) -> dict[str, float]:
    """Of each way; the short form tries none."""
    if short:
        return dict.fromkeys(WAYS, 3e-3)
    return best_rates(
        lambda way, seed, rate: measured(trained(way, seed, STEPS, rate), seed)["F2"], WAYS
    )


def one(seed: int, short: bool) -> dict[str, float]:
    """Both ways on the same articles, and how far the projection is from exact."""
    found: dict[str, float] = {}
    for way in WAYS:
        layer = trained(way, seed, 10 if short else STEPS, rates(short)[way])
        found |= {f"{name}, {way}": value for name, value in measured(layer, seed).items()}
    return found | {"error of the projection": projection(seed)}


def projection(seed: int) -> float:
    """The largest error of sums and gradients of random rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, incoming = torch.randn(2, 50, SENTENCES, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    found = sparsemax(logits)
    (grad,) = torch.autograd.grad(found, logits, incoming)
    support = found > 0
    mean = (incoming * support).sum(1, keepdim=True) / support.sum(1, keepdim=True)
    wanted = torch.where(support, incoming - mean, 0.0)
    return max(
        float((found.detach().sum(1) - 1).abs().max()), float((grad - wanted.detach()).abs().max())
    )


def promises(found: Figures) -> list[Promise]:
    """What is exact, what is left out, and what it costs."""
    zeros = found["others at 0, sparsemax"]
    return [
        promise(
            "rows sum to 1 and gradients are those of the projection, to 1e-9", "mechanism",
            [1e-9 - x for x in found["error of the projection"]],
        ),
        promise("more than half of the other sentences have weight 0", "mechanism", zeros, 0.5),
        promise(
            "more weight on the relevant sentence than softmax", "mechanism",
            found["weight of the relevant, sparsemax"], found["weight of the relevant, softmax"],
        ),
        promise(
            f"F2 no more than {SLACK:g} below softmax", "quality",
            found["F2, sparsemax"], found["F2, softmax"], SLACK,
        ),
        Promise(
            "the highest recall and F2 on COLIEE", "quality",
            reason="the data are not public, and the encoder is a large language model",
        ),
    ]  # fmt: skip


CLAIM = Claim(
    gs.attention.Paraformer,
    "The highest recall and F2 among the compared systems for retrieval on COLIEE.",
    f"Synthetic articles of {SENTENCES} sentences behind a frozen random encoder. Each sentence says "
    "yes or no, and the label is what the one with the query's words says. "
    f"{STEPS} steps of AdamW.",
    one,
    promises,
    remark="Each way's learning rate is the better of two on another seed.",
)
