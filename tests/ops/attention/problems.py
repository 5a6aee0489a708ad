"""Random problems of every kind: shapes, layouts, biases, positions, starting states."""

import random

import torch

from gossamer.ops.attention import Layout


def lists(generator, batch, heads, groups, keys, most):
    """Random sorted lists: offsets (batch, heads, groups + 1) and the keys."""
    mask = torch.rand(batch * heads * groups, keys, generator=generator)
    mask = mask < torch.rand(batch * heads * groups, 1, generator=generator) * most
    counts = mask.sum(1).reshape(batch, heads, groups)
    ends = counts.flatten().cumsum(0).reshape(counts.shape)
    starts = ends.flatten().new_zeros(batch, heads, 1)
    if groups:
        starts = ends[..., :1] - counts[..., :1]
    offsets = torch.cat([starts, ends], dim=-1)
    return offsets, mask.nonzero()[:, 1].int()


def layout(rng, generator, batch, heads, queries, keys):
    """A layout of one of five kinds."""
    rows = rng.choice([1, 3, 16, 50, 64, 128])
    columns = rng.choice([1, 7, 16, 32, 64, 100])
    lead = (rng.choice([1, batch]), rng.choice([d for d in range(1, heads + 1) if heads % d == 0]))
    kind, most = rng.randrange(5), rng.choice([0.1, 0.6, 1.5])
    shape = (-(-queries // rows), -(-keys // columns))
    blocks = torch.rand(*lead, *shape, generator=generator) < rng.random()
    if kind == 0:
        return Layout.from_blocks(blocks, queries, keys, rows, columns)
    if kind == 1:
        mask = torch.rand(*lead, queries, keys, generator=generator) < rng.choice([0.05, 0.9])
        whole = blocks.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        return Layout.from_mask(mask | whole[:, :, :queries, :keys], rows, columns)
    if kind == 2:
        group = rng.choice([1, 2, 5])
        groups = -(-queries // group)
        found = Layout.empty(queries, keys, rows=group)
        return found.with_tokens(*lists(generator, *lead, groups, keys, most), group)
    if kind == 3:  # tokens where the same queries' tiles are not
        groups = shape[0]
        base = Layout.from_blocks(blocks, queries, keys, rows, columns)
        return base.with_tokens(*lists(generator, *lead, groups, keys, most), rows)
    base = Layout.from_blocks(blocks, queries, keys, rows, columns)
    few = rng.choice([d for d in range(1, rows + 1) if rows % d == 0])
    return base.with_tokens(*lists(generator, *lead, -(-queries // few), keys, most), few)


def positions(rng, generator, batch, heads, length):
    """Permuted, for all, or for each batch and head; or none."""
    if rng.random() < 0.4:
        return None
    shape = rng.choice([(1, 1), (batch, 1), (1, heads), (batch, heads)])
    order = torch.stack(
        [torch.randperm(length, generator=generator) for _ in range(shape[0] * shape[1])]
    )
    return order[0] if rng.random() < 0.3 else order.reshape(*shape, length)


def problem(seed, dtype=torch.float32, least=0):
    """(query, key, value, layout, options of `attention`)."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, shared = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 1, 2, 3])
    heads = kv_heads * shared
    queries = rng.choice([least, 1, 2, 17, 63, 64, 65, 130])
    keys = rng.choice([least, 1, 9, 64, 70, 128, 140])
    width, value_width = rng.choice([1, 5, 16, 40, 64, 96]), rng.choice([1, 7, 16, 48, 64, 96])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query = normal(batch, heads, queries, width) * rng.choice([1, 1, 5])
    key, value = normal(batch, kv_heads, keys, width), normal(batch, kv_heads, keys, value_width)
    found = layout(rng, generator, batch, heads, queries, keys)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"causal": rng.random() < 0.5, "scale": rng.choice([None, None, 0.3, -0.2])}
    if rng.random() < 0.4:
        options["block_bias"] = torch.randn(found.blocks.numel(), generator=generator).to(sums)
    if rng.random() < 0.4:
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        bias = torch.randn(rng.choice([1, batch]), rng.choice(divisors), keys, generator=generator)
        bias[torch.rand(bias.shape, generator=generator) < rng.choice([0, 0.3])] = -torch.inf
        options["key_bias"] = bias.to(sums)
    if options["causal"]:
        options["query_positions"] = positions(rng, generator, batch, heads, queries)
        options["key_positions"] = positions(rng, generator, batch, heads, keys)
    if rng.random() < 0.3:
        lse = torch.randn(batch, heads, queries, generator=generator).to(sums)
        lse[torch.rand(lse.shape, generator=generator) < 0.3] = -torch.inf
        options["start"] = (normal(batch, heads, queries, value_width), lse)
    return query, key, value, found, options
