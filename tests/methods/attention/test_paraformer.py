"""Paraformer's head: sparse weights over sentences, padding, and mixing with lexical scores."""

import pytest
import torch

import gossamer as gs
from gossamer.methods.attention.paraformer import combined


def made(seed=0, **options):
    torch.manual_seed(seed)
    return gs.attention.Paraformer(32, **options).eval()


@torch.no_grad()
def test_one_relevant_sentence_of_thirty_gets_the_weight():
    """An article with one sentence near the query: sparsemax leaves most others at exactly 0."""
    found = made()
    found.ask.weight.copy_(torch.eye(32))
    query = torch.nn.functional.normalize(torch.randn(8, 32), dim=-1)
    sentences = torch.nn.functional.normalize(torch.randn(8, 30, 32), dim=-1)
    sentences[:, 11] = query
    weights = found.attention(query, sentences)
    assert (weights.argmax(1) == 11).all()
    assert ((weights > 0).sum(1) <= 10).all() and (weights[:, 11] > 0.3).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(8))
    soft = made(weights="softmax")
    soft.load_state_dict(found.state_dict())
    assert (soft.attention(query, sentences) > 0).all()
    assert (soft.attention(query, sentences)[:, 11] < 0.15).all()


def test_sentences_without_weight_get_no_gradient():
    found = made()
    sentences = torch.randn(2, 30, 32, requires_grad=True)
    weights = found.attention(torch.randn(2, 32), sentences)
    weights[:, :15].sum().backward()
    unused = weights == 0
    assert unused.any() and not sentences.grad[unused].any()


@torch.no_grad()
def test_a_document_without_sentences_has_a_mean_of_zero():
    for weights in ("sparsemax", "softmax"):
        found = made(weights=weights)
        query, sentences = torch.randn(1, 32), torch.full((1, 3, 32), torch.nan)
        logits = found(query, sentences, torch.zeros(1, 3, dtype=torch.bool))
        asked = found.ask(query)
        seen = torch.tanh(found.mix(torch.cat([torch.zeros(1, 32), asked], 1)))
        torch.testing.assert_close(logits, found.classify(seen))


def test_scores_are_mixed_by_the_share():
    scores, lexical = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert combined(scores, lexical).tolist() == pytest.approx([0.1, 1.8])
    with pytest.raises(gs.UsageError, match="share"):
        combined(scores, lexical, 1.5)
    with pytest.raises(gs.UsageError, match="differ"):
        combined(scores, lexical[:1])
