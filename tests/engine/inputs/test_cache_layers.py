"""Layers of sparse caches against lists of rows, over random sequences of operations."""

import random

import pytest
import torch

import gossamer as gs

pytest.importorskip("transformers")

from gossamer.core.attention import CachedKeys
from gossamer.engine.inputs.caches.cache import keeper_of
from gossamer.engine.inputs.caches.layer import Arrival, SparseLayer

HEADS, KV, WIDTH = 4, 2, 8
SCALE = 0.4
A = gs.attention


def channels():
    generator = torch.Generator().manual_seed(0)
    return {0: torch.rand(KV, WIDTH, generator=generator).argsort(-1)[:, :4].sort(-1).values}


METHODS = {
    "snapkv": A.SnapKV(tokens=9, last=5, sinks=1, window=3, kernel=3),
    "snapkv-share": A.SnapKV(density=0.4, last=5, sinks=1, window=2, kernel=3),
    "adasnapkv": A.AdaSnapKV(tokens=9, last=5, sinks=1, window=3, kernel=3),
    "streamingllm": A.StreamingLLM(window=6, sinks=2),
    "s2attention": A.S2Attention(local=2, stride=2, block=3),
    "s2attention-near": A.S2Attention(local=1, stride=2, block=2),
    "quest": A.Quest(tokens=9, page=4),
    "quest-share": A.Quest(density=0.3, page=3),
    "doublesparsity": A.DoubleSparsity(5, factor=2, dense=0, channels=channels()),
    "doublesparsity-16": A.DoubleSparsity(5, factor=2, bits=16, dense=0, channels=channels()),
}
EVICTING = (
    "snapkv",
    "snapkv-share",
    "adasnapkv",
    "streamingllm",
    "s2attention",
    "s2attention-near",
)


class Text:
    """One text as lists: for each head of keys its rows (position, key, value)."""

    def __init__(self):
        self.rows = [[] for _ in range(KV)]
        self.length = 0
        self.recent = []
        self.pending = True
        self.since = 0

    def copy(self):
        found = Text()
        found.__dict__.update(self.__dict__)
        found.rows, found.recent = [list(rows) for rows in self.rows], list(self.recent)
        return found

    def padded(self):
        most = max(map(len, self.rows))
        key, value = torch.zeros(2, KV, most, WIDTH)
        places = torch.full((KV, most), -1)
        for h, rows in enumerate(self.rows):
            for i, (place, k, v) in enumerate(rows):
                places[h, i], key[h, i], value[h, i] = place, k, v
        return key, value, places

    def end_prompt(self, method):
        if self.pending and hasattr(method, "kept_keys"):
            key, value, places = self.padded()
            last = method.last
            query = torch.stack(self.recent[-last:], 1) if last and self.recent else None
            query = torch.zeros(HEADS, 0, WIDTH) if query is None else query
            kept = method.kept_keys(CachedKeys(query, key, value, places, self.length, SCALE))
            for h in range(KV):
                self.rows[h] = [r for r, stays in zip(self.rows[h], kept[h], strict=False) if stays]
            self.since = 0
        self.pending, self.recent = False, []

    def append(self, key, value):
        for h in range(KV):
            self.rows[h].append((self.length, key[h], value[h]))
        self.length += 1
        self.since += 1

    def roll(self, method):
        """What a full window gives up for a single new token."""
        if hasattr(method, "rolls") and len(self.rows[0]) > method.sinks + method.window:
            for rows in self.rows:
                del rows[method.sinks]
            self.since = 0

    def attend(self, query, only=None):
        """(HEADS, WIDTH): over all rows, or over places of each head of keys."""
        found = torch.zeros(HEADS, WIDTH)
        for head in range(HEADS):
            h = head // (HEADS // KV)
            rows = [r for r in self.rows[h] if only is None or r[0] in only[h]]
            keys, values = (torch.stack([r[i] for r in rows]).double() for i in (1, 2))
            weights = (keys @ query[head].double() * SCALE).softmax(0)
            found[head] = weights @ values
        return found

    def chosen(self, method, query):
        """Places that a selecting method reads, from nothing but the keys."""
        key, _, _ = self.padded()
        page, whole = method.page, self.length // method.page
        rest = self.length - whole * page
        budget = min(method.keys_read(self.length, 0, 1), self.length)
        count = (budget - rest) // page
        places = [set(range(whole * page, self.length)) for _ in range(KV)]
        if count >= whole:
            return [set(range(self.length)) for _ in range(KV)]
        notes = method.summarise(key[None, :, : whole * page].unflatten(2, (-1, page)), 0)
        scores = method.score(query[None, :, None], notes, 0)[0].clone()
        if not rest:
            scores[:, -1] = torch.inf
        for h in range(KV):
            order = sorted(range(whole), key=lambda p: (-scores[h, p].item(), p))
            for p in order[: max(0, count)]:
                places[h] |= set(range(p * page, p * page + page))
        assert all(len(p) <= budget for p in places)
        return places


class Plain:
    """A whole layer as lists."""

    def __init__(self, method, texts):
        self.method, self.texts, self.seen = method, [Text() for _ in range(texts)], 0

    def call(self, query, key, value, real):
        new = query.shape[2]
        output = torch.zeros(len(self.texts), new, HEADS, WIDTH)
        for t, text in enumerate(self.texts):
            if new == 1:
                text.end_prompt(self.method)
            for i in range(new):
                if not real[t, i]:
                    continue
                text.append(key[t, :, i], value[t, :, i])
                only = None
                if new == 1:
                    text.roll(self.method)
                    if hasattr(self.method, "score") and hasattr(self.method, "summarise"):
                        only = text.chosen(self.method, query[t, :, i])
                else:
                    text.pending = True
                    text.recent.append(query[t, :, i])
                output[t, i] = text.attend(query[t, :, i], only)
        self.seen += new
        return output


def dense(query, real):
    """The model's own attention, with a mask as long as the keys it is given."""

    def run(key, value):
        assert key.shape[2] == real.shape[1]
        past = key.shape[2] - query.shape[2]
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(past)
        mask = causal & real[:, None, None]
        mask = mask | ~mask.any(-1, keepdim=True)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True, scale=SCALE
        ).transpose(1, 2)

    return run


def run(method, seed, steps=14):
    """Random operations on both; every output, count and length is compared."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = draw.choice((1, 1, 2, 3))
    layer, plain = SparseLayer(keeper_of(method, 0, 1)), Plain(method, batch)
    mask = torch.zeros(batch, 0, dtype=torch.bool)
    done = []
    for step in range(steps):
        kind = "prompt" if step == 0 else draw.choice(
            ("prompt", "token", "token", "token", "token", "reorder", "crop", "repeat", "select")
        )  # fmt: skip
        done.append(kind)
        texts = len(plain.texts)
        if kind in ("prompt", "token"):
            new = 1 if kind == "token" else draw.randint(2, 30)
            query = torch.randn(texts, HEADS, new, WIDTH, generator=generator)
            key, value = (torch.randn(texts, KV, new, WIDTH, generator=generator) for _ in "kv")
            real = torch.ones(texts, new, dtype=torch.bool)
            if kind == "prompt" and texts > 1 and draw.random() < 0.6:
                for text in range(texts - 1):
                    side = (
                        slice(0, draw.randint(0, new - 2))
                        if draw.random() < 0.7
                        else slice(-1, None)
                    )
                    real[text, side] = False
            mask = torch.cat([mask, real], 1)
            given = None if bool(real.all()) else real
            found = layer.attend(Arrival(query, key, value, given, SCALE, dense(query, mask)))
            wanted = plain.call(query, key, value, real)
            shown = real[:, :, None, None]
            torch.testing.assert_close(found * shown, wanted, rtol=1e-4, atol=1e-5, msg=str(done))
        elif kind in ("reorder", "select", "repeat"):
            if kind == "reorder":
                chosen = [draw.randrange(texts) for _ in range(texts)]
                layer.reorder_cache(torch.tensor(chosen))
            elif kind == "select":
                chosen = sorted(draw.sample(range(texts), draw.randint(1, texts)))
                layer.batch_select_indices(torch.tensor(chosen))
            else:
                chosen = [t for t in range(texts) for _ in range(2)] if texts < 3 else range(texts)
                layer.batch_repeat_interleave(len(chosen) // texts)
            plain.texts = [plain.texts[t].copy() for t in chosen]
            mask = mask[list(chosen)]
        else:
            count = draw.randint(1, 4)
            try:
                layer.crop(-count)
            except gs.UsageError:
                first = plain.texts[0]
                last = mask[:, -count:]
                held_back = method.card.name in {METHODS[n].card.name for n in EVICTING} and (
                    first.pending or min(t.since for t in plain.texts) < count
                )
                assert held_back or count > plain.seen or not bool(last.all()), done
            else:
                for t, text in enumerate(plain.texts):
                    gone = int(mask[t, -count:].sum())
                    text.rows = [
                        [r for r in rows if r[0] < text.length - gone] for rows in text.rows
                    ]
                    text.length -= gone
                    text.since -= gone
                mask = mask[:, :-count]
                plain.seen -= count
        assert layer.get_seq_length() == plain.seen == mask.shape[1]
        assert layer.get_mask_sizes(3) == (plain.seen + 3, 0)
    return layer, plain


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", METHODS)
def test_any_sequence_of_operations_is_that_of_lists(name, seed):
    run(METHODS[name], seed)
