"""Which keys SnapKV, Ada-SnapKV and StreamingLLM keep, against loops over single numbers."""

import math

import pytest
import torch
from examples import CACHES

import gossamer as gs
from gossamer.core.attention import CachedKeys

A = gs.attention
EVICTING = ("snapkv", "adasnapkv")


def cached(length=60, heads=4, kv_heads=2, last=16, width=8, seed=0, gone=0.0):
    """Normal numbers; a share of the earlier keys is gone already, different ones of each head."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, min(last, length), width, generator=generator) * 2
    key, value = (torch.randn(kv_heads, length, width, generator=generator) for _ in "kv")
    stay = torch.rand(kv_heads, length, generator=generator) >= gone
    stay[:, length - min(last, length) :] = True
    places = torch.full((kv_heads, int(stay.sum(1).max())), -1)
    rows = torch.zeros(2, *places.shape, width)
    for h in range(kv_heads):
        n = int(stay[h].sum())
        places[h, :n] = stay[h].nonzero()[:, 0]
        rows[0, h, :n], rows[1, h, :n] = key[h, stay[h]], value[h, stay[h]]
    return CachedKeys(query, rows[0], rows[1], places, length, width**-0.5)


def weights_of(c):
    """[head][query][row], with plain exponentials."""
    found = []
    for head in range(c.query.shape[0]):
        h, queries = head // c.shared, c.query.shape[1]
        rows = []
        for i in range(queries):
            place = c.length - queries + i
            row = [
                math.exp(float(c.query[head, i] @ c.key[h, j]) * c.scale)
                if 0 <= p <= place
                else 0.0
                for j, p in enumerate(c.positions[h].tolist())
            ]
            rows.append([x / sum(row) for x in row])
        found.append(rows)
    return torch.tensor(found, dtype=torch.float64)


def pooled(scores, kernel):
    """Averages over neighbours, with zeros beyond the ends."""
    half, n = kernel // 2, scores.shape[-1]
    found = [scores[..., max(0, j - half) : j + half + 1].sum(-1) / kernel for j in range(n)]
    return torch.stack(found, -1)


def always(c, method):
    place = c.positions
    return (place >= 0) & ((place < method.sinks) | (place >= c.length - method.window))


def ranked(scores, sure, there):
    """Rows by rank: sure ones, then by score, ties by index."""
    order = sorted(range(len(scores)), key=lambda j: (not sure[j], -float(scores[j]), j))
    return [j for j in order if there[j]]


@pytest.mark.parametrize("gone", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_snapkv_is_the_card_step_by_step(seed, gone):
    method, c = CACHES["snapkv"](), cached(seed=seed, gone=gone)
    weights = weights_of(c).unflatten(0, (2, 2))
    scores = pooled(weights.mean(1).sum(1), method.kernel)
    torch.testing.assert_close(
        method.score(c)[c.exists], scores.float()[c.exists], rtol=1e-4, atol=1e-6
    )
    kept, sure = method.kept_keys(c), always(c, method)
    for h in range(2):
        wanted = ranked(scores[h], sure[h], c.exists[h])[: method.tokens]
        assert kept[h].nonzero()[:, 0].tolist() == sorted(wanted)


@pytest.mark.parametrize("gone", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_adasnapkv_is_the_card_step_by_step(seed, gone):
    method, c = CACHES["adasnapkv"](floor=0.6), cached(seed=seed, gone=gone)
    weights = weights_of(c).unflatten(0, (2, 2))
    scores = pooled(weights.amax(2).amax(1), method.kernel)
    sure = always(c, method)
    floor = max(int(0.6 * method.tokens), method.sinks + method.window)
    own = [set(ranked(scores[h], sure[h], c.exists[h])[:floor]) for h in range(2)]
    rest = [
        (-float(scores[h, j]), h, j)
        for h in range(2)
        for j in range(c.positions.shape[1])
        if c.exists[h, j] and j not in own[h]
    ]
    for _, h, j in sorted(rest)[: 2 * (method.tokens - floor)]:
        own[h].add(j)
    kept = method.kept_keys(c)
    for h in range(2):
        assert kept[h].nonzero()[:, 0].tolist() == sorted(own[h])
    assert int(kept.sum()) == 2 * method.tokens


def test_the_floor_is_a_fifth_of_the_budget_and_never_below_what_is_fixed():
    c = cached(length=400, last=8)
    c.key[0].zero_()  # attends evenly, and the other head a few keys alone
    c.query[2:] *= 100
    kept = A.AdaSnapKV(tokens=100, last=8, sinks=2, window=6, kernel=1).kept_keys(c)
    assert kept.sum() == 200 and 20 <= kept[1].sum() <= 25
    kept = A.AdaSnapKV(tokens=100, last=8, sinks=4, window=26, kernel=1).kept_keys(c)
    assert kept.sum() == 200 and kept[1].sum() >= 30  # 4 + 26 are fixed


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 60])
def test_equal_scores_keep_what_is_fixed_and_a_row_of_each_head(name, density, length):
    c = cached(length=length)
    for x in (c.query, c.key):
        x.zero_()
    for method in (CACHES[name](density=density), CACHES[name](tokens=8)):
        kept = method.kept_keys(c)
        assert bool((kept | ~always(c, method)).all()) and bool(kept.any(1).all())
        most = max(int(density * length), 8) if method.density else 8
        assert kept.sum() <= 2 * most


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("tokens", [8, 9, 20, 59, 60, 61, 1000])
def test_the_budget_is_met_and_not_exceeded(name, tokens):
    kept = CACHES[name](tokens=tokens).kept_keys(cached())
    assert int(kept.sum()) == 2 * min(tokens, 60)
    kept = CACHES[name](density=tokens / 1000).kept_keys(cached(length=500))
    assert int(kept.sum()) == 2 * max(8, tokens // 2)


@pytest.mark.parametrize("name", EVICTING)
def test_a_key_that_the_end_of_the_prompt_wants_is_kept(name):
    c = cached(length=300)
    c.query[:] = 0.3 * c.query + 3
    c.key[1, 100] = 4  # every query of the second head of keys
    method = CACHES[name](kernel=1)
    kept = method.kept_keys(c)
    assert kept[1, 100] and not CACHES[name](kernel=1).kept_keys(cached(length=300))[:, 100].all()


def test_streaming_keeps_sinks_and_window():
    kept = A.StreamingLLM(window=6, sinks=3).kept_keys(cached(last=0))
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 2, *range(54, 60)]


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize(
    "bad",
    [
        {"tokens": 7}, {"tokens": 0}, {"tokens": 2.5}, {"density": 0}, {"density": 1.1},
        {"window": 0}, {"sinks": -1}, {"kernel": 4}, {"last": 0}, {"window": 19},
    ],
)  # fmt: skip
def test_bad_options_are_refused(name, bad):
    with pytest.raises(gs.UsageError, match="SnapKV"):
        CACHES[name](**bad)
    with pytest.raises(gs.UsageError, match="floor"):
        A.AdaSnapKV(floor=0.0)
