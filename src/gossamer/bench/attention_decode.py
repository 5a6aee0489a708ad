"""Decoding in the suite `attention`: chosen keys of a long cache, and caches in tiles.

What is chosen takes turns, so that nothing read is in a cache of the processor. The dense engines
are torch's, on memory as torch gives it, and ours over every key. Where keys are chosen, `of_gather`
is the time of a loop that reads the same stretches and does nothing else, over ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
    caches = []
    for turn in range(_CACHES):
        moved = [x.roll(turn, 2) for x in (key, value)]
        masks = [method.kept_entries(x[:, :, :old], i == 0) for i, x in enumerate(moved)]
        tiles = [
            kv_tiles.pack(x[:, :, :old], mask, keys=i == 0)
            for i, (x, mask) in enumerate(zip(moved, masks, strict=True))
        ]
        whole = [x.clone() for x in moved]
        for x, mask in zip(whole, masks, strict=True):
            x[:, :, :old] *= mask
        caches.append((tiles, [x[:, :, old:].clone() for x in moved], whole))

    def ours(turn: int) -> Tensor:
        tiles, ends, _ = caches[turn]
        return kv_tiles.decode(query, tiles[:1], tiles[1:], *ends)[0]

    def dense(name: str) -> Callable[[], Tensor]:
        engines = itertools.cycle([_dense(case, query, *whole)[name] for _, _, whole in caches])
        return lambda: next(engines)()

    every = torch.arange(-(-case.keys // 64)).expand(1, case.kv_heads, -1)
    turn, other = itertools.cycle(range(_CACHES)), itertools.cycle(range(_CACHES))
    calls: Calls = {
        "gossamer": lambda: ours(next(turn)),
        **{name: dense(name) for name in _dense(case, query, key, value)},
        "gossamer dense": lambda: decode(query, *caches[next(other)][2], every, page=64)[0],
    }
    exact = decode(query.double(), *(x.double() for x in caches[0][2]), every, page=64)[0]
    check(case, "gossamer", ours(0), exact)
    check(case, "gossamer dense", calls["gossamer dense"](), exact)
    with torch.inference_mode():
        found = interleaved(calls, rounds)
    held = sum(part.nbytes for part in (*caches[0][0], *caches[0][1]))
    dense_bytes = key.nbytes + value.nbytes
    record = found.record(case, limits.seconds(held, 0))
    return {**record, "density": case.kept, "memory": held / dense_bytes, "tail": case.keys - old}


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
