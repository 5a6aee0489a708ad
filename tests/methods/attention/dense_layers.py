"""Attention layers with dense maps, masked by what a layer chose: what its forward must equal.

Each is written anew from the paper's formulas and takes a layer's parameters only.
"""

import torch
from torch.nn import functional as F


def top(scores, count):
    """bool: the `count` largest of each row."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def drsformer(layer, x):
    """One product of map and values for each share, as the release has it."""
    q, k, v = layer.local(layer.qkv(x)).chunk(3, dim=1)
    q, k, v = (part.reshape(len(x), layer.heads, -1, x[0, 0].numel()) for part in (q, k, v))
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    logits = torch.einsum("bhcp,bhdp->bhcd", q, k) * layer.temperature
    out = 0
    for weight, count in zip(layer.weights, layer.counts):
        shares = logits.exp() * top(logits, count)
        out = out + weight * (shares / shares.sum(-1, keepdim=True)) @ v
    return layer.project(out.reshape(x.shape))


def restormer(layer, x):
    """The whole map, once."""
    q, k, v = layer.local(layer.qkv(x)).chunk(3, dim=1)
    q, k, v = (part.reshape(len(x), layer.heads, -1, x[0, 0].numel()) for part in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    shares = (torch.einsum("bhcp,bhdp->bhcd", q, k) * layer.temperature).softmax(-1)
    return layer.project((layer.weights.sum() * shares @ v).reshape(x.shape))


def turned(x):
    """Rotary positions in halves, base 10,000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2]).unsqueeze(-1) * 10000.0 ** (-torch.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def dma_chosen(bias, count):
    """bool (batch, heads, queries, keys): row by row, the highest of what the row may see."""
    length = bias.shape[-1]
    chosen = torch.zeros(*bias.shape, length, dtype=torch.bool)
    for row in range(length):
        seen = bias[..., : row + 1].flip(-1)  # of equal ones the later
        chosen[..., row, : row + 1] = top(seen, min(count, row + 1)).flip(-1)
    return chosen


def dma(layer, x, chosen=dma_chosen):
    rms = torch.nn.functional.rms_norm
    q, k, v = (split(part(x), h) for part, h in (
        (layer.query, layer.heads), (layer.key, layer.kv_heads), (layer.value, layer.kv_heads)
    ))  # fmt: skip
    width = q.shape[-1]
    q = turned(rms(q, (width,), layer.query_norm.weight, 1e-6))
    k = turned(rms(k, (width,), layer.key_norm.weight, 1e-6))
    z = layer.importance(layer.value(x)).transpose(1, 2)
    bias = layer.slope[:, None] * torch.log1p(z.exp())
    kept = chosen(bias, layer.keys)
    k, v, bias, kept = (
        part.repeat_interleave(layer.heads // layer.kv_heads, dim=1) for part in (k, v, bias, kept)
    )
    logits = q @ k.transpose(-1, -2) / width**0.5 + bias[:, :, None]
    found = logits.masked_fill(~kept, -torch.inf).softmax(-1) @ v
    return layer.project(found.transpose(1, 2).flatten(2))


def dma_dense(layer, x):
    return dma(layer, x, lambda bias, count: causal(bias.shape[-1]).expand(*bias.shape, -1))


def routing(layer, x, everything=False):
    length, width = x.shape[1], layer.channels // layer.heads
    q, v = split(layer.query(x), layer.heads), split(layer.value(x), layer.heads)
    near, r = q[:, : layer.local], q[:, layer.local :]
    k = turned(split(layer.key(x), layer.local))
    place = torch.arange(length)
    window = causal(length) & (place > place[:, None] - layer.window)
    window = causal(length) if everything else window
    logits = (turned(near) @ k.transpose(-1, -2) / width**0.5).masked_fill(~window, -torch.inf)
    outputs = [logits.softmax(-1) @ v[:, : layer.local]]
    r = (r - r.mean(-1, keepdim=True)) / (r.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = r @ r.transpose(-1, -2) / width**0.5
    total, count = 0, 0
    for cluster in range(layer.means.shape[1]):
        scores = torch.einsum("bhnd,hd->bhn", r, layer.means[:, cluster])
        if layer.whole:
            member = top(scores, min(layer.window, length))
            kept = member[..., None] & member[..., None, :] & causal(length)
        else:
            kept = dma_chosen(scores, length if everything else layer.window)
            kept = kept & kept.diagonal(dim1=-2, dim2=-1)[..., None]
        inside = kept.any(-1, keepdim=True)
        shares = logits.masked_fill(~kept, -1e9).softmax(-1) * inside
        total, count = total + shares @ v[:, layer.local :], count + inside.to(x.dtype)
    outputs.append(total / (count + 0.01))
    return layer.project(torch.cat(outputs, dim=1).transpose(1, 2).flatten(2))


def sparsegin(layer, x, attention, cut=None):
    """Token by token."""
    cut = layer.cut if cut is None else cut
    found = []
    for i in range(x.shape[1]):
        message = layer.epsilon * x[:, i]
        for j in range(i + 1):
            total = attention[:, :, i, j].sum(1).clamp(max=1)
            weight = 1 / (1 + (-layer.sharpness * (total - layer.threshold)).exp())
            message = message + torch.where(weight > cut, weight, 0)[:, None] * x[:, j]
        z = layer.network(message) + message
        eps = torch.finfo(z.dtype).eps
        z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * layer.norm.weight
        found.append(x[:, i] + layer.scale * z)
    return torch.stack(found, dim=1)
