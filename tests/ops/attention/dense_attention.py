"""Attention by the book, in float64: dense logits, a mask, a softmax."""

import torch

from gossamer.ops.attention import bits


def spread(x, batch, heads):
    """(batch, heads, ...) from what is shared."""
    x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return x.expand(batch, *x.shape[1:])


def tile_of(layout, batch, heads):
    """int64 (batch, heads, queries, keys): which entry computes a pair; -1 none, -2 a single key."""
    lists = layout.offsets.shape[:2]
    shape = (*lists, layout.query_blocks, layout.rows, layout.key_blocks, layout.columns)
    found = torch.full(shape, -1)
    entry = torch.arange(layout.blocks.numel())
    masks = torch.ones(entry.numel(), layout.rows, layout.columns, dtype=torch.bool)
    if layout.tiles is not None:
        some = layout.tiles >= 0
        masks[some] = bits.unpack(layout.masks, layout.columns)[layout.tiles[some].long()]
    row = torch.repeat_interleave(layout.offsets.diff(dim=-1).flatten())
    flat = found.flatten(0, 2).transpose(1, 2)  # (lists, key blocks, rows, columns)
    flat[row, layout.blocks.long()] = torch.where(masks, entry.reshape(-1, 1, 1), -1)
    found = found.flatten(4, 5).flatten(2, 3)[:, :, : layout.queries, : layout.keys]
    found = spread(found, batch, heads).clone()
    if layout.tokens is not None:
        lists = layout.token_offsets.shape
        single = torch.zeros(*lists[:2], lists[2] - 1, layout.keys, dtype=torch.bool)
        row = torch.repeat_interleave(layout.token_offsets.diff(dim=-1).flatten())
        single.flatten(0, 2)[row, layout.tokens.long()] = True
        single = single.repeat_interleave(layout.group, dim=2)[:, :, : layout.queries]
        found[spread(single, batch, heads)] = -2
    return found


def dense(
    query, key, value, layout, *, causal=False, scale=None, block_bias=None, key_bias=None,
    query_positions=None, key_positions=None, start=None,
):  # fmt: skip
    """(output, lse) in float64, differentiable."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    entry = tile_of(layout, batch, heads)
    q, k, v = (
        query.double(),
        spread(key.double(), batch, heads),
        spread(value.double(), batch, heads),
    )
    logits = q @ k.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    mask = entry != -1
    if block_bias is not None and block_bias.numel():
        tile = block_bias.double()[entry.clamp(min=0)]
        logits = logits + torch.where(entry >= 0, tile, 0.0)
    if key_bias is not None:
        own = spread(key_bias.double(), batch, heads).unsqueeze(2)
        mask = mask & (own != -torch.inf)
        logits = logits + torch.where(own == -torch.inf, 0.0, own)
    if causal:
        now = torch.arange(keys - queries, keys) if query_positions is None else query_positions
        then = torch.arange(keys) if key_positions is None else key_positions
        now, then = (p.reshape(1, 1, -1) if p.dim() == 1 else p for p in (now, then))
        now, then = spread(now, batch, heads), spread(then, batch, heads)
        mask = mask & (now.unsqueeze(-1) >= then.unsqueeze(-2))
    if start is not None:  # one more key, with its own logit and value
        logits = torch.cat([logits, start[1].double().unsqueeze(-1)], dim=-1)
        mask = torch.cat([mask, (start[1] != -torch.inf).unsqueeze(-1)], dim=-1)
    some = mask.any(-1, keepdim=True)
    safe = torch.where(mask, logits, -1e300)
    top = safe.amax(-1, keepdim=True).detach() if safe.shape[-1] else safe.new_zeros(())
    weights = torch.where(mask, torch.exp(torch.where(mask, logits - top, 0.0)), 0.0)
    total = torch.where(some, weights.sum(-1, keepdim=True), 1.0)
    shares = weights / total
    output = shares[..., :keys] @ v
    if start is not None:
        output = output + shares[..., keys:] * start[0].double()
    lse = torch.where(some, torch.log(total) + top, -torch.inf).squeeze(-1)
    return output, lse
