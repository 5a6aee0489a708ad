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
