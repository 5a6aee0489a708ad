"""Bits per byte against a hand count, embeddings, decoding against transformers' own."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from examples import PRUNERS
from torch import nn

from gossamer.core.errors import NonFiniteError, UsageError
from gossamer.engine.measure.evaluate import bits_per_byte, decode_speed, embedding_similarity
from gossamer.engine.prune.run import prune
from gossamer.engine.serve.generate import generate


class Uniform256(nn.Module):
    """Every byte equally probable: exactly 8 bits each."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.seen = []

    def forward(self, input_ids):
        self.seen.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.value.expand(*input_ids.shape, 256))


def test_uniform_model_needs_eight_bits():
    model = Uniform256()
    data = bytes(range(256)) * 3 + b"tail"
    assert abs(bits_per_byte(model, data, window=100, batch=3) - 8.0) < 1e-5
    assert model.seen == [(3, 100), (3, 100), (1, 100), (1, 72)]


def test_tokens_are_all_scored_once_but_the_first():
    model = Uniform256()
    data = b"abcd" * 25
    value = bits_per_byte(model, data, window=10, encode=lambda text: [1] * (len(text) // 2))
    assert abs(value - 8.0 * 49 / 100) < 1e-5


def test_bits_per_byte_by_hand(tiny):
    model, _ = tiny("llama")
    data = bytes(torch.randint(0, 64, (40,)).tolist())
    model.eval()
    nats = 0.0
    with torch.no_grad():
        for at in (0, 16, 32):
            ids = torch.tensor([list(data[at : at + 16])])
            logp = model(input_ids=ids).logits.double().log_softmax(-1)[0]
            nats -= sum(float(logp[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
    expected = nats / math.log(2) / (15 + 15 + 7)
    assert abs(bits_per_byte(model, data, window=16) - expected) < 1e-5
    model.train()
    bits_per_byte(model, data, window=16)
    assert model.training


@pytest.mark.parametrize(
    "data, arguments, message",
    [
        (b"", {}, "two tokens"),
        (b"x", {}, "two tokens"),
        (b"\xff" * 9, {}, "vocabulary of 64"),
        (b"ab", {"window": 1}, "window"),
        (b"ab", {"batch": 0}, "batch"),
    ],
)
def test_bits_per_byte_errors(tiny, data, arguments, message):
    model, _ = tiny("llama")
    with pytest.raises(UsageError, match=message):
        bits_per_byte(model, data, **arguments)


def test_nan_logits_are_reported():
    with pytest.raises(NonFiniteError):
        bits_per_byte(Uniform256(float("nan")), b"abcdef")


def test_embedding_similarity(tiny):
    dense, batches = tiny("bert")
    assert abs(embedding_similarity(dense, dense, batches) - 1.0) < 1e-5
    values = [
        embedding_similarity(
            dense, prune(copy.deepcopy(dense), PRUNERS["magnitude"](), density=density), batches
        )
        for density in (0.9, 0.5, 0.1)
    ]
    assert 1.0 > values[0] > values[1] > values[2]
    with pytest.raises(UsageError, match="empty"):
        embedding_similarity(dense, dense, [])


def test_padding_does_not_change_an_embedding(tiny):
    dense, _ = tiny("bert")
    ids = torch.randint(0, 64, (1, 6))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 5])
    from gossamer.engine.measure.evaluate import embed

    dense.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            embed(dense, {"input_ids": ids}),
            embed(dense, {"input_ids": padded, "attention_mask": mask}),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generate_equals_full_passes(tiny, family):
    model, _ = tiny(family)
    ids = torch.randint(3, 64, (2, 5))
    out = generate(model, ids, 8)
    assert out.shape == (2, 13)
    assert torch.equal(out[:, :5], ids)
    model.eval()
    with torch.no_grad():
        for at in range(5, 13):
            assert torch.equal(model(input_ids=out[:, :at]).logits[:, -1].argmax(-1), out[:, at])


def test_generate_stops_at_eos(tiny):
    model, _ = tiny("llama")
    ids = torch.randint(3, 64, (1, 5))
    free = generate(model, ids, 12)[0, 5:].tolist()
    eos = free[3]
    stopped = generate(model, ids, 12, eos=eos)[0, 5:].tolist()
    assert stopped == free[: free.index(eos) + 1]


@pytest.mark.parametrize(
    "ids, new, message",
    [
        (torch.zeros(1, 0, dtype=torch.int64), 4, "non-empty"),
        (torch.zeros(5, dtype=torch.int64), 4, "non-empty"),
        (torch.zeros(1, 5, dtype=torch.int64), 0, "at least 1"),
        (torch.zeros(1, 60, dtype=torch.int64), 5, "64 positions"),
    ],
)
def test_generate_errors(tiny, ids, new, message):
    model, _ = tiny("gpt2")
    with pytest.raises(UsageError, match=message):
        generate(model, ids, new)


def test_model_without_cache_cannot_decode(tiny):
    model, _ = tiny("bert")
    with pytest.raises(UsageError, match="cache"):
        generate(model, torch.zeros(1, 4, dtype=torch.int64), 2)


def test_decode_speed(tiny):
    model, _ = tiny("llama")
    speed = decode_speed(model, copy.deepcopy(model), torch.zeros(1, 4, dtype=torch.int64), 3, 2)
    assert speed.dense > 0
    assert speed.sparse > 0
    assert speed.ratio == speed.sparse / speed.dense
    assert (speed.unit, speed.repeats) == ("tokens/s", 2)
