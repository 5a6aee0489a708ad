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


def regions_of(layer, height, width):
    """int64 (pixels,): the region of each pixel, cut with the last ones short."""
    rows, columns = (-(-side // layer.regions) for side in (height, width))
    row = torch.arange(height) // rows
    return (row.unsqueeze(1) * layer.regions + torch.arange(width) // columns).flatten()


def biformer(layer, x, whole=False):
    """Pixels in their own order, each with the pixels of its region's routes."""
    batch, channels, height, width = x.shape
    q, k, v = layer.qkv(x).flatten(2).chunk(3, dim=1)
    region = regions_of(layer, height, width)
    kinds = region.unique()
    means = [torch.stack([p[:, :, region == r].mean(-1) for r in kinds], 1) for p in (q, k)]
    routes = top(means[0] @ means[1].transpose(1, 2), layer.routes)
    place = torch.searchsorted(kinds, region)
    mask = routes[:, place][:, :, place].unsqueeze(1)
    q, k, seen = (p.reshape(batch, layer.heads, -1, height * width).mT for p in (q, k, v))
    logits = q @ k.mT / channels**0.5
    if not whole:
        logits = logits.masked_fill(~mask, -torch.inf)
    out = (logits.softmax(-1) @ seen).mT.reshape(x.shape)
    return layer.project(out + layer.local(v.reshape(x.shape)))


def sparsifiner(layer, x, whole=False):
    """Masked by the largest entries of |basis| times the largest coefficients."""
    batch, count, _ = x.shape
    q, k, v = (
        part.reshape(batch, count, layer.heads, -1).transpose(1, 2)
        for part in layer.qkv(x).chunk(3, dim=-1)
    )
    short = torch.einsum("bhnc,nr->bhcr", layer.predictor["key"](k), layer.compress)
    weights = (layer.predictor["query"](q) @ short / layer.heads**0.5).softmax(-1)
    weights = weights * top(weights, layer.coefficients)
    basis = torch.where(layer.basis.abs() > layer.threshold, layer.basis.abs(), 0.0)
    mask = top(weights @ basis.T, layer.budget)
    mask[:, :, 0] = True
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if not whole:
        logits = logits.masked_fill(~mask, -torch.inf)
    return layer.project((logits.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


def simplex(logits):
    """Sparsemax by bisection of its threshold."""
    low, high = logits.amin(-1, keepdim=True) - 1, logits.amax(-1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = (logits - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (logits - low).clamp(min=0)


def paraformer(layer, query, sentences, real, whole=False):
    """One document after another, without its padding."""
    found = []
    for asked, rows, there in zip(query @ layer.ask.weight.T, sentences, real):
        scores = rows[there] @ asked
        shares = scores.softmax(-1) if whole else simplex(scores)
        seen = layer.mix.weight @ torch.cat([shares @ rows[there], asked])
        found.append(layer.classify(seen.tanh()))
    return torch.stack(found)


def adjacency(layout):
    """bool (queries, keys) of single keys of single queries."""
    mask = torch.zeros(layout.queries, layout.keys, dtype=torch.bool)
    row = torch.repeat_interleave(layout.token_offsets.flatten().diff())
    mask[row, layout.tokens.long()] = True
    return mask


def mesh_transformer(layer, x, edges, whole=False):
    """Every pair of nodes, with minus infinity where no edge is; a row without edges is 0."""
    mask = adjacency(edges) | whole
    hidden = layer.encode(x)
    for block in layer.blocks:
        parts = block.qkv(block.before(hidden)).unflatten(-1, (3, block.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        shares = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        seen = (shares.nan_to_num() @ v).transpose(1, 2).flatten(2)
        hidden = hidden + block.project(seen)
        normal = block.between(hidden)
        hidden = hidden + block.down(F.gelu(block.gate(normal)) * block.up(normal))
    return layer.decode(hidden)


def sparse_graph_tracker(layer, previous, current, relations, pairs):
    """Edges as a matrix of previous by current nodes; means over those that exist."""
    there = torch.zeros(len(previous), len(current), 1)
    there[pairs[0], pairs[1]] = 1
    related = relations.new_zeros(len(previous), len(current), 6)
    related[pairs[0], pairs[1]] = relations
    start = layer.encode(related), layer.encode(related * related.new_tensor([-1] * 4 + [1] * 2))
    onward, back = start
    for _ in range(layer.rounds):
        old = previous.unsqueeze(1).expand(-1, len(current), -1)
        new = current.unsqueeze(0).expand(len(previous), -1, -1)
        onward = layer.edge(torch.cat([new, old, start[0], onward], -1))
        back = layer.edge(torch.cat([old, new, start[1], back], -1))
        ahead = layer.forward_message(torch.cat([old, onward], -1)) * there
        behind = layer.backward_message(torch.cat([new, back], -1)) * there
        current = layer.node(ahead.sum(0) / there.sum(0).clamp(min=1))
        previous = layer.node(behind.sum(1) / there.sum(1).clamp(min=1))
    edges = layer.score_edge((onward + back) / 2)[pairs[0], pairs[1], 0]
    return torch.cat([edges, layer.score_node(current)[:, 0]])


def gtsp(layer, x, real, whole=False):
    """One graph after another: all of its pairs, with minus infinity at dropped nodes."""
    found = x.clone()
    for i, (nodes, there) in enumerate(zip(x, real)):
        scores = layer.score(nodes)[:, 0].masked_fill(~there, -torch.inf)
        count = max(1, int(layer.tokens * there.sum() + 1e-9))
        kept = top(scores, count) & there
        kept[there.nonzero().max()] = True
        kept = there if whole else kept
        parts = (
            p(nodes).unflatten(-1, (layer.heads, -1)) for p in (layer.query, layer.key, layer.value)
        )
        q, k, v = (part.transpose(0, 1) for part in parts)
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~kept, -torch.inf)
        seen = logits.softmax(-1) @ v * layer.active[:, None, None]
        change = layer.project(seen.transpose(0, 1).flatten(1))
        found[i] = nodes + change * kept.unsqueeze(1)
    return found


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
