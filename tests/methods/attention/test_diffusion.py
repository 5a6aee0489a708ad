"""What each method for diffusion models promises beyond its role: counts, orders, budgets, and the
figures of its card on seeded maps."""

import importlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from maps import attended

import gossamer as gs
from gossamer.claims.attention import videoblade
from gossamer.claims.diffusion import blocky, call_of, normal, weights
from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import DenoisingStep
from gossamer.methods.attention.light_forcing import spent
from gossamer.methods.attention.orders import (
    band,
    frames_together,
    hilbert,
    reordered,
    restored,
    space_filling,
)
from gossamer.methods.attention.psa import over_means
from gossamer.methods.attention.rettention import CUT
from gossamer.methods.attention.steps import (
    blocks_per_row,
    count_pairs,
    dense,
    sampled_mass,
    sizes,
    tile_mass,
)
from gossamer.methods.attention.svg2 import cluster_layout, counts, kmeans, nearest
from gossamer.ops.attention import Layout

A = gs.attention


def one(name, seed=0):
    return importlib.import_module(f"gossamer.claims.attention.{name}").one(seed, False)


def call(tokens, seed=0, heads=2, batch=1):
    return call_of(*(normal(seed + i, batch, heads, tokens, 16) for i in range(3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_svg2_finds_interleaved_clusters(seed):
    found = one("svg2", seed)
    assert found["density, clusters"] < 0.11 and found["recall, clusters"] > 0.98
    assert found["recall, blocks at that density"] < 0.15
    assert found["density, blocks for that recall"] > 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_rettention_needs_both_parts(seed):
    found = one("rettention", seed)
    window, scaled, residual, both = (
        found[f"error, {name}, little drift"] for name in ("window", "scaled", "residual", "both")
    )
    assert 0.15 < window < 0.25 and 0.8 < scaled < 0.9 and residual < 0.02 and both < 0.01
    assert both < residual / 2


@pytest.mark.parametrize("seed", [0, 1])
def test_adaspa_searches_exactly_and_lasts(seed):
    found = one("adaspa", seed)
    exact = found["recall, exact"]
    assert abs(found["recall, log-sum-exp of the first search"] - exact) < 0.01
    assert exact - found["recall, choice used again"] < 0.05
    assert exact - found["recall, means of blocks"] > 0.1
    assert found["recall, shuffled keys, used again"] < 0.3


def test_sparse_vdit_names_all_planted_heads():
    found = one("sparsevdit", 5)
    assert found["heads named right"] == 1 and found["error on new input"] < 0.1


def test_blade_counts_kept_keys_twice_unless_apart():
    found = videoblade.attended(3, False)
    assert found["error, blocks alone"] > found["error, as published"] > 0.1
    assert found["error, disjoint"] < 0.02


def test_light_forcing_spends_its_budget_and_finds_the_needle():
    found = one("lightforcing", 1)
    assert found["budget missed"] < 1e-6 and found["budget missed, with a cut"] < 1e-6
    assert found["needle found"] == 1 and found["needle found, window"] == 0


def test_the_curve_visits_every_place_and_steps_to_neighbours():
    for axes, depth in ((2, 4), (3, 3)):
        line = torch.arange(2**depth)
        place = torch.cartesian_prod(*[line] * axes)
        order = hilbert(place, depth)
        assert sorted(order.tolist()) == list(range(2 ** (depth * axes)))
        assert (place[order.argsort()].diff(dim=0).abs().sum(1) == 1).all()
    grid = gs.TokenGrid(3, 5, 7, text=4, text_first=False)
    order = space_filling(grid)
    assert sorted(order.tolist()) == list(range(109)) and order[-4:].tolist() == [
        105,
        106,
        107,
        108,
    ]


def test_orders_are_undone():
    grid = gs.TokenGrid(3, 4, 5, text=2)
    x = torch.randn(2, 3, grid.tokens, 4)
    each = torch.rand(2, 3, grid.tokens).argsort(-1)
    for order in (frames_together(grid), space_filling(grid), each):
        assert torch.equal(restored(reordered(x, order), order), x)
    together = frames_together(grid)
    assert together[:2].tolist() == [0, 1] and together[2:8].tolist() == [2, 22, 42, 3, 23, 43]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("group", "reach"), [(1, 0), (1, 9), (3, 2), (5, 100)])
def test_a_band_is_what_it_says(first, group, reach):
    grid = gs.TokenGrid(3, 5, 7, text=6, text_first=first)
    place = torch.full((grid.tokens,), -1)
    place[grid.video_at] = torch.arange(grid.video) // group
    text = place < 0
    wanted = (place.unsqueeze(1) - place).abs() <= reach
    wanted |= text.unsqueeze(1) | text
    layout = band(grid, group, reach, 16, torch.device("cpu"))
    assert torch.equal(attended(layout, call(grid.tokens))[0, 0], wanted)
    assert count_pairs(layout, 2) == 2 * int(wanted.sum())


def test_masses_are_sums_and_maxima_of_the_dense_map():
    made = call(100)
    _, lse = dense(made)
    whole = weights(made)
    padded = torch.nn.functional.pad(whole, (0, 12, 0, 12))
    tiles = padded.unflatten(3, (7, 16)).unflatten(2, (7, 16))
    torch.testing.assert_close(tile_mass(made, lse, 16, 16), tiles.sum((3, 5)))
    few = AttentionCall(made.query[:, :, ::4], made.key[:, :, ::4], made.value, made.scale, False)
    sampled = torch.nn.functional.pad(weights(few), (0, 3, 0, 3))
    tiles = sampled.unflatten(3, (7, 4)).unflatten(2, (7, 4))
    torch.testing.assert_close(sampled_mass(made, 16, 16, 4), tiles.amax((3, 5)))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.66, 0.9])
@pytest.mark.parametrize("text", [0, 20])
def test_adaspa_computes_at_most_what_was_asked(density, text):
    grid = gs.TokenGrid(4, 9, 9, text=text)
    made, step = call(grid.tokens, heads=4), DenoisingStep(5, 10, "", grid)
    for adaptive in (True, False):
        method = A.AdaSpa(density, block=16, adaptive=adaptive)
        kept = method.choose(made, step, tile_mass(made, dense(made)[1], 16, 16))
        layout = Layout.from_blocks(kept, grid.tokens, grid.tokens, 16, 16)
        measured = count_pairs(layout, 4) / (4 * grid.tokens**2)
        blocks = kept.shape[-1]
        assert measured <= max(density, 3 / blocks + 2 * 2 / blocks * (text > 0))
        assert measured > density - 2 / blocks - 0.02
        inner = kept[:, :, 2:] if text else kept
        assert (inner.sum(-1) == inner.sum(-1)[..., :1]).all(), "rows of a head keep the same count"
        if text:
            assert kept[..., :2].all() and kept[:, :, :2].all()


def test_adaspa_searches_when_the_paper_does_and_caps_its_groups():
    method = A.AdaSpa(density=0.3, block=16)
    made, kinds, state = blocky(0, blocks=8), [], None
    for number in range(50):
        found = method.attend(made, DenoisingStep(number, 50), state)
        state = found.state
        kinds.append((found.kind, found.search_pairs > 0))
    assert kinds[:10] == [("dense", False)] * 10 and kinds[10] == ("dense", True)
    assert kinds[30] == ("chosen", True)
    assert {*kinds[11:30], *kinds[31:]} == {("reused", False)}
    best, worst = method.groups(torch.tensor([[0.9, 0.95, 0.85, 0.99], [0.1, 0.9, 0.2, 0.3]]))
    assert best.tolist() == [[False, True, False, True], [False, True, False, False]]
    assert worst.tolist() == [[True, False, True, False], [True, False, False, False]]


def test_a_budget_in_blocks_counts_ragged_ends_and_text():
    size = sizes(100, 16, torch.device("cpu"))
    none = torch.zeros(7, dtype=torch.bool)
    assert size.tolist() == [16] * 6 + [4]
    assert (
        blocks_per_row(1.0, size, size, none) == 7 and blocks_per_row(0.32, size, size, none) == 2
    )
    assert blocks_per_row(0.31, size, size, none) == 1
    text = none.clone()
    text[0] = True  # 1,600 of 10,000 pairs are its row
    assert blocks_per_row(0.32, size, size, text) == 1


def test_rettention_runs_dense_when_the_paper_does_and_cuts_its_shares():
    grid = gs.TokenGrid(1, 8, 8)
    method = A.Rettention(first=0.25, every=5)
    made, kinds, state, cut = call(64), [], None, 0
    shares = []
    for number in range(20):
        found = method.attend(made, DenoisingStep(number, 20, "", grid), state)
        state = found.state
        kinds.append(found.kind == "dense")
        cut += found.figures.get(CUT, 0)
        shares.append(None if state is None else state.share)
    assert [n for n, is_dense in enumerate(kinds) if is_dense] == [0, 1, 2, 3, 4, 5, 10, 15]
    torch.testing.assert_close(shares[7], (shares[5] + 0.08).clamp(max=1))
    assert torch.equal(shares[10], shares[5]) and cut == 0
    quick = replace(method, growth=0.9)
    state = quick.attend(made, DenoisingStep(5, 20, "", grid), None).state
    found = quick.attend(made, DenoisingStep(6, 20, "", grid), state)
    assert found.figures[CUT] > 0 and found.state.share.max() == 1


def test_clusters_are_exact_to_the_token():
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(5, (2, 4, 100), generator=generator).sort(-1).values
    key = torch.randint(7, (2, 2, 100), generator=generator).sort(-1).values
    kept = torch.rand(2, 4, 5, 7, generator=generator) < 0.4
    kept[..., 0] = True
    layout = cluster_layout(kept, query, key, 16)
    spread = key.repeat_interleave(2, dim=1)
    wanted = torch.stack(
        [
            torch.stack([kept[b, h][query[b, h].unsqueeze(1), spread[b, h]] for h in range(4)])
            for b in range(2)
        ]
    )
    seen = AttentionCall(
        torch.zeros(2, 4, 100, 8), torch.zeros(2, 2, 100, 8), torch.zeros(2, 2, 100, 8), 1.0, False
    )
    assert torch.equal(attended(layout, seen), wanted)
    assert count_pairs(layout, 8) == int(wanted.sum())


def test_kmeans_lowers_the_distance_and_keeps_empty_centroids():
    x = torch.randn(1, 2, 200, 4, generator=torch.Generator().manual_seed(0))
    first = x[:, :, :6].clone()
    first[:, :, 5] = 100.0  # nothing is near
    spread = []
    for rounds in range(5):
        centre, label = kmeans(x, first, rounds)
        assert torch.equal(label, nearest(x, centre)), "labels are by the last centroids"
        own = centre.gather(2, label.unsqueeze(-1).expand_as(x))
        spread.append(float((x - own).square().sum()))
    assert all(a >= b for a, b in pairwise(spread)) and spread[-1] < 0.8 * spread[0]
    assert (centre[:, :, 5] == 100).all() and (counts(label, 6)[..., 5] == 0).all()


def test_svg2_goes_on_from_its_centroids_and_leaves_text_out():
    grid = gs.TokenGrid(2, 6, 6, text=8)
    made = call(grid.tokens)
    method = A.SVG2(6, 9, layers=0, first=0.0, start=1, each=2)
    step = DenoisingStep(1, 10, "", grid)
    centroids, labels = method.clusters(made, grid.text_at, None)
    assert (labels[0][..., :8] == 6).all() and (labels[1][..., :8] == 9).all()
    assert (labels[0][..., 8:] < 6).all() and (labels[1][..., 8:] < 9).all()
    after = method.attend(made, step, centroids).state
    longer, _ = replace(method, start=3).clusters(made, grid.text_at, None)
    torch.testing.assert_close(after.query, longer.query)
    torch.testing.assert_close(after.key, longer.key)
    with pytest.raises(gs.UsageError, match=r"clusters of keys.*give keys="):
        replace(method, keys=500).attend(made, step, None)


def test_sizes_of_clusters_weigh():
    """A large cluster of middling keys holds more attention than a small one of better keys."""
    query = torch.zeros(1, 1, 64, 2)
    query[..., 0] = 1.0
    key = torch.zeros(1, 1, 64, 2)
    key[:, :, :60, 1] = 5.0  # sixty keys of product 0
    key[:, :, 60:, 0] = 2.0  # four of product 2
    made = AttentionCall(query, key, key, 1.0, False)
    method = A.SVG2(1, 2, share=0.5, least=0.0, layers=0)
    found, labels = method.clusters(made, slice(0, 0), None)
    kept = method.choose(found, labels, made)[0, 0, 0, :2]
    many = int(labels[1][0, 0, 0])
    assert kept[many] and not kept[1 - many]


def test_blade_keeps_between_its_bounds_and_weighs_as_published():
    made = call(512, heads=2)
    method = A.VideoBLADE(share=0.6, least=0.1, most=0.3, pool=4, block=16)
    kept = method.choose(made, 0)
    inner = kept[..., :-2, :-2].sum(-1)
    assert kept[..., -2:].all() and kept[..., -2:, :].all()
    assert (inner <= int(0.3 * 32)).all() and (kept[..., :-2, :].sum(-1) >= 4).all()
    found = method.attend(made, DenoisingStep(0, 4), None).output
    (one, one_lse), _ = over_means(made, kept, 1, 16, 16)
    means = [x.unflatten(2, (-1, 4)).mean(3) for x in (made.key, made.value)]
    logits = made.query @ means[0].mT * made.scale
    two, two_lse = logits.softmax(-1) @ means[1], logits.logsumexp(-1)
    alpha = one_lse.exp() / (one_lse.exp() + 4 * two_lse.exp())
    wanted = alpha.unsqueeze(-1) * one + (1 - alpha).unsqueeze(-1) * two
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_schedule_is_solved_with_the_cut_in_place():
    shares, works = [0.7, 0.5, 0.4], [2.0, 3.0, 4.0]
    found = spent(shares, works, 0.05, 0.2)
    assert sum(a * b for a, b in zip(found, works)) == pytest.approx(0.2 * 9, rel=1e-9)
    slope = [(d - 0.05) / s for d, s in zip(found, shares)]
    assert slope == pytest.approx([slope[0]] * 3), "beta is one"
    found = spent(shares, works, 0.05, 0.9)
    assert found[0] == 1 and sum(a * b for a, b in zip(found, works)) == pytest.approx(
        8.1, rel=1e-9
    )


def test_light_forcing_is_dense_in_the_first_chunk_and_knows_its_chunks():
    grid = gs.TokenGrid(2, 4, 8)
    method = A.LightForcing(0.4, 0.2, chunks=3, frames=1, block=16)
    step = DenoisingStep(0, 4, "", grid)

    def chunk(index, extra=0):
        keys = (index + 1) * 64 + extra
        tensors = (normal(i, 1, 2, n, 8) for i, n in enumerate((64, keys, keys)))
        return call_of(*tensors)

    assert method.attend(chunk(0), step, None).kind == "dense"
    densities = method.densities(grid)
    for index in (1, 2):
        pairs = method.attend(chunk(index), step, None).pairs
        blocks = 4 * (index + 1)
        assert pairs / (2 * 64 * 64 * (index + 1)) == int(densities[index - 1] * blocks) / blocks
    assert densities[0] > densities[1]
    for bad in (chunk(3), chunk(1, extra=5)):
        with pytest.raises(gs.UsageError, match="whole chunks come before"):
            method.attend(bad, step, None)


def test_patterns_of_another_model_are_refused():
    grid = gs.TokenGrid(2, 4, 8)
    method = A.SparseVDiT(block=16)
    step = DenoisingStep(0, 4, "", grid)
    with pytest.raises(gs.UsageError, match=r"no patterns for layer 0.*calibrate_denoising"):
        method.attend(call(64), step, None)
    fitted = method.fitted({0: [method.observe_step(call(64), step)]})
    with pytest.raises(gs.UsageError, match="for 2 heads and 4 blocks"):
        fitted.attend(call(64, heads=4), step, None)
    assert method.mode_of([0.5, 0.4, 0.4, 0.7, 0.9]) == "skip"
    assert method.mode_of([1.5, 1.4, 1.3, 1.7, 1.9]) == "dense", "every loss is above the limit"
