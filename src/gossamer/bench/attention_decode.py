"""Decoding in the suite `attention`: chosen keys of a long cache, and caches in tiles.

What is chosen takes turns, so that nothing read is in a cache of the processor. The dense engines
are torch's, on memory as torch gives it, and ours over every key. Where keys are chosen, `of_gather`
is the time of a loop that reads the same stretches and does nothing else, over ours.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.bench.attention_case import Calls, Case, check, inputs
from gossamer.bench.measure import Limits, Repeats, interleaved
from gossamer.engine.inputs.caches.rows import Prompt
from gossamer.engine.inputs.caches.selected import SelectingKeeper
from gossamer.methods.attention import DoubleSparsity, Mustafar, Quest
from gossamer.ops import _dispatch, kv_tiles
from gossamer.ops.attention import decode, room

_TURNS = 8
"""Lists of keys that take turns."""
_CACHES = 4
"""Caches in tiles that take turns."""


def chosen(case: Case, limits: Limits, rounds: Repeats | int) -> dict[str, Any]:
    """One query over a share of the pages, given or chosen."""
    query, dense_key, dense_value = inputs(case, 1)
    key, value = room((1, case.kv_heads, case.keys), case.width, case.width, query.dtype)
    key.copy_(dense_key)
    value.copy_(dense_value)
    generator, pages = torch.Generator().manual_seed(3), case.keys // case.page
    count = max(1, int(pages * case.density))
    lists = [
        torch.stack([torch.randperm(pages, generator=generator)[:count] for _ in range(case.kv_heads)])
        for _ in range(_TURNS)
    ]  # fmt: skip
    turns = itertools.cycle([one.unsqueeze(0) for one in lists])
    first = lists[0].unsqueeze(0)
    expected = decode(query.double(), key.double(), value.double(), first, page=case.page)[0]
    check(case, "gossamer", decode(query, key, value, first, page=case.page)[0], expected)
    every = torch.arange(pages).expand(1, case.kv_heads, -1)
    calls: Calls = {
        "gossamer": lambda: decode(query, key, value, next(turns), page=case.page)[0],
        "gather": _gather(case, key, lists),
        **_dense(case, query, dense_key, dense_value),
        "gossamer dense": lambda: decode(query, key, value, every, page=case.page)[0],
    }
    if case.chooser:
        calls["gossamer"] = _choosing(case, query, key, value)
    with torch.inference_mode():
        found = interleaved(calls, rounds)
    density = count * case.page / case.keys
    record = found.record(case, limits.seconds((key.nbytes + value.nbytes) * density, 0))
    of_gather = found.seconds["gather"] / found.seconds["gossamer"]
    return {
        **record, "density": density, "of_ideal": record["ratio"] * density, "of_gather": of_gather
    }  # fmt: skip


def tiled(case: Case, limits: Limits, rounds: Repeats | int) -> dict[str, Any]:
    """One query over tiles and a dense tail, against everything dense."""
    query, key, value = inputs(case, 1)
    method = Mustafar(density=case.kept)
    old = (case.keys - method.every // 2 - method.tail) // kv_tiles.TILE * kv_tiles.TILE
    caches = [_pruned(method, old, key.roll(i, 2), value.roll(i, 2)) for i in range(_CACHES)]

    def ours(cache: _Pruned) -> Tensor:
        return kv_tiles.decode(query, [cache.keys], [cache.values], cache.key, cache.value)[0]

    every = torch.arange(-(-case.keys // 64)).expand(1, case.kv_heads, -1)

    def whole(cache: _Pruned, cast: torch.dtype = query.dtype) -> Tensor:
        parts = (x.to(cast) for x in (query, *cache.whole))
        return decode(next(parts), next(parts), next(parts), every, page=64)[0]

    others = [_dense(case, query, *cache.whole) for cache in caches]
    calls: Calls = {
        "gossamer": _in_turn([functools.partial(ours, cache) for cache in caches]),
        **{name: _in_turn([other[name] for other in others]) for name in others[0]},
        "gossamer dense": _in_turn([functools.partial(whole, cache) for cache in caches]),
    }
    exact = whole(caches[0], torch.float64)
    check(case, "gossamer", ours(caches[0]), exact)
    check(case, "gossamer dense", whole(caches[0]), exact)
    with torch.inference_mode():
        found = interleaved(calls, rounds)
    one = caches[0]
    held = sum(part.nbytes for part in (one.keys, one.values, one.key, one.value))
    record = found.record(case, limits.seconds(held, 0))
    memory = held / (key.nbytes + value.nbytes)
    return {**record, "density": case.kept, "memory": memory, "tail": case.keys - old}


@dataclass(frozen=True, eq=False)
class _Pruned:
    """Tiles, the dense tail, and both together with zeros where entries were dropped."""

    keys: kv_tiles.Tiles
    values: kv_tiles.Tiles
    key: Tensor
    value: Tensor
    whole: tuple[Tensor, Tensor]


def _pruned(method: Mustafar, old: int, key: Tensor, value: Tensor) -> _Pruned:
    masks = [method.kept_entries(x[:, :, :old], i == 0) for i, x in enumerate((key, value))]
    tiles = [
        kv_tiles.pack(x[:, :, :old], mask, keys=i == 0)
        for i, (x, mask) in enumerate(zip((key, value), masks, strict=True))
    ]
    for x, mask in zip((key, value), masks, strict=True):
        x[:, :, :old] *= mask
    keys, values = tiles
    return _Pruned(keys, values, key[:, :, old:].clone(), value[:, :, old:].clone(), (key, value))


def _in_turn(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _dense(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Calls:
    grouped = query.unflatten(1, (case.kv_heads, -1))[:, :, :, 0] * case.width**-0.5

    def matmul() -> Tensor:
        weights = torch.softmax(grouped @ key.transpose(-1, -2), dim=-1)
        return (weights @ value).flatten(1, 2).unsqueeze(2)

    def sdpa() -> Tensor:
        shared = case.heads != case.kv_heads
        return functional.scaled_dot_product_attention(query, key, value, enable_gqa=shared)

    check(case, "matmul dense", matmul(), sdpa())
    return {"sdpa dense": sdpa, "matmul dense": matmul}


def _gather(case: Case, key: Tensor, lists: list[Tensor]) -> Callable[[], Tensor]:
    """Reads what `decode` reads, and nothing else."""
    data = torch.empty(0).set_(key.untyped_storage())
    token = 2 * case.width * key.element_size() // 4  # of a key and its value, in float32
    heads = torch.arange(case.kv_heads).unsqueeze(1) * case.keys * token
    starts = itertools.cycle([(one * case.page * token + heads).flatten() for one in lists])
    module, isa = _dispatch.compiled(), _dispatch.isa_index()

    def call() -> Tensor:
        threads = torch.get_num_threads()
        return torch.tensor(
            module.gather_floats(data, next(starts), case.page * token, threads, isa)
        )

    return call


def _choosing(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """A cache whose method chooses; queries take turns."""
    method: Any = Quest(density=case.density, page=case.page)
    if case.chooser == "doublesparsity":
        channels = torch.arange(0, case.width, 4).expand(case.kv_heads, -1)
        method = DoubleSparsity(density=case.density, dense=0, channels={0: channels})
    rows = SelectingKeeper(method, 0, 1).start(Prompt(query, key, value, case.width**-0.5))
    generator = torch.Generator().manual_seed(4)
    queries = itertools.cycle(
        [torch.randn(query.shape, generator=generator).to(query.dtype) for _ in range(_TURNS)]
    )
    return lambda: rows.attend(next(queries), case.width**-0.5)[0]
