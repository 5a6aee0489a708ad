"""What Quest and Double Sparsity read, against single products and the release's statistic."""

import pytest
import torch
from examples import CACHES
from golden import load

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.methods.attention.double_sparsity import packed, statistic

A = gs.attention


def rows(pages=6, page=4, width=16, seed=0, heads=4):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, 1, width, generator=generator)
    return query, torch.randn(2, 2, pages, page, width, generator=generator)


def test_quest_bounds_every_key_of_a_page_and_sums_over_the_group():
    method = CACHES["quest"]()
    query, pages = rows()
    notes = method.summarise(pages, 0)
    scores = method.score(query, notes, 0)
    wanted = torch.zeros(2, 2, 6)
    for t in range(2):
        for head in range(4):
            for p in range(6):
                low, high = notes["least"][t, head // 2, p], notes["most"][t, head // 2, p]
                bound = sum(
                    max(float(q * a), float(q * b))
                    for q, a, b in zip(query[t, head, 0], low, high, strict=True)
                )
                assert bound >= float((pages[t, head // 2, p] @ query[t, head, 0]).max()) - 1e-5
                wanted[t, head // 2, p] += bound
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["quest", "doublesparsity"])
def test_notes_of_pages_one_by_one_are_those_of_all(name):
    method = CACHES[name]()
    _, pages = rows(page=method.page)
    whole = method.summarise(pages, 0)
    for p in range(6):
        for key, note in method.summarise(pages[:, :, p : p + 1], 0).items():
            assert torch.equal(note[:, :, 0], whole[key][:, :, p])


@pytest.mark.parametrize("tokens", [16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_quest_reads_no_more_than_asked_at_any_length(tokens, page):
    pytest.importorskip("transformers")
    from gossamer.engine.inputs.caches.rows import Prompt
    from gossamer.engine.inputs.caches.selected import SelectingKeeper

    keeper = SelectingKeeper(A.Quest(tokens=tokens, page=page), 0, 1)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 90, 16, generator=generator)
    held = keeper.start(Prompt(key[:, :, :0], key[:, :, :0], key[:, :, :0], 1.0))
    for n in range(90):
        held.append(key[:, :, n : n + 1], key[:, :, n : n + 1])
        query = torch.randn(1, 4, 1, 16, generator=generator)
        _, read = held.attend(query, 1.0)
        index, _ = held.chosen(query)
        newest = n // page
        assert (index == newest).any(-1).all()
        assert min(n + 1, tokens) - page < read.keys / 2 <= min(n + 1, tokens)
        assert read.keys / 2 == min(n + 1, tokens) or n + 1 > tokens


@pytest.mark.parametrize("factor", [2, 4])
def test_channels_are_those_of_the_released_statistics_averaged(factor):
    """From the release's statistic of two samples of 20 tokens, of which it keeps the last alone."""
    expected = load("double_sparsity")["expected"]
    first, second = (
        torch.tensor(expected[name]["values"], dtype=torch.float64)
        for name in ("statistic_sample1", "statistic_sample2_alone")
    )
    seen = [{"sums": 20 * x, "tokens": 20, "kv_heads": 4} for x in (first, second)]
    order = torch.tensor(expected["sorted_channels_mean_of_both"]["values"])
    found = A.DoubleSparsity(factor=factor).fitted({0: seen}).channels[0]
    assert torch.equal(found, order[:, : 8 // factor].sort(-1).values)
    released = torch.tensor(expected["sorted_channels_as_released"]["values"])
    alone = A.DoubleSparsity(factor=factor).fitted({0: seen[1:]}).channels[0]
    assert torch.equal(alone, released[:, : 8 // factor].sort(-1).values)


def test_the_statistic_is_a_mean_over_tokens_of_all_prompts():
    generator = torch.Generator().manual_seed(0)
    calls = []
    for length in (5, 11):
        query = torch.randn(2, 4, length, 8, generator=generator)
        key = torch.randn(2, 2, length, 8, generator=generator)
        calls.append(AttentionCall(query, key, key, 1.0, True))
    method = A.DoubleSparsity()
    found = statistic([method.observe(call) for call in calls])
    for head in range(4):
        values = [
            (call.query[t, head, i] * call.key[t, head // 2, i]).abs()
            for call in calls
            for t in range(2)
            for i in range(call.queries)
        ]
        assert len(values) == 32
        torch.testing.assert_close(found[head].float(), torch.stack(values).mean(0))


@pytest.mark.parametrize("bits", [4, 16])
def test_double_sparsity_estimates_by_its_channels(bits):
    method = CACHES["doublesparsity"](bits=bits)
    query, pages = rows(pages=40, page=1)
    notes = method.summarise(pages, 1)
    found = method.score(query, notes, 1)
    for t in range(2):
        for h in range(2):
            channels = method.channels[1][h]
            label = pages[t, h, :, 0][:, channels]
            estimate = (query[t, 2 * h : 2 * h + 2, 0][:, channels] @ label.T) * 4**-0.5
            wanted = estimate.softmax(-1).sum(0)
            tolerance = 1e-5 if bits == 16 else 0.02
            torch.testing.assert_close(found[t, h], wanted, rtol=10 * tolerance, atol=tolerance)
    held = sum(x.nbytes for x in notes.values())
    assert held == 2 * 2 * 40 * (4 * 4 if bits == 16 else 2 + 4)


def test_four_bits_are_within_half_a_step():
    label = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0)) * 3
    label[0, 0, 7] = 2.5  # a key without any range
    notes = packed(label)
    codes = torch.cat([notes["codes"] & 15, notes["codes"] >> 4], -1).float()
    scale, least = notes["range"].float().unbind(-1)
    back = codes * scale.unsqueeze(-1) + least.unsqueeze(-1)
    step = (label.amax(-1) - label.amin(-1)) / 15
    assert bool(((back - label).abs() <= 0.5 * step.unsqueeze(-1) + 0.02).all())


def mass_kept(channels_of, loud, tokens=64, seed=0):
    """Dense attention that lies on the chosen keys; keys with 4 loud channels of 64, or none."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.ones(64)
    strength[loud] = 8.0
    key = torch.randn(1, 1, 1024, 64, generator=generator) * strength
    query = torch.randn(1, 1, 1024, 64, generator=generator)
    call = AttentionCall(query, key, key, 64**-0.5, True)
    method = A.DoubleSparsity(tokens, factor=16, bits=16, dense=0)
    method = method.fitted({0: [method.observe(call)]}) if channels_of is None else A.DoubleSparsity(
        tokens, factor=16, bits=16, dense=0, channels={0: channels_of}
    )  # fmt: skip
    fresh = torch.randn(1, 1, 1, 64, generator=generator)
    scores = method.score(fresh, method.summarise(key.unsqueeze(3), 0), 0)
    chosen = gs.keep(scores, gs.TopK(tokens))
    dense = (fresh @ key.transpose(2, 3) / 8).softmax(-1)[:, :, 0]
    return float(dense[chosen].sum())


def test_calibrated_channels_keep_attention_and_the_gain_vanishes_on_flat_ones():
    loud = torch.tensor([5, 20, 33, 60])
    other = torch.tensor([[1, 2, 3, 4]])
    ours = [mass_kept(None, loud, seed=s) for s in range(5)]
    arbitrary = [mass_kept(other, loud, seed=s) for s in range(5)]
    assert sum(ours) > 2 * sum(arbitrary)
    flat = torch.tensor([], dtype=torch.int64)
    ours = [mass_kept(None, flat, seed=s) for s in range(5)]
    arbitrary = [mass_kept(other, flat, seed=s) for s in range(5)]
    assert abs(sum(ours) - sum(arbitrary)) < 0.5 * sum(arbitrary)


@pytest.mark.parametrize("name", ["quest", "doublesparsity"])
def test_dense_layers_are_inside_a_density_and_outside_tokens(name):
    method = CACHES[name](density=0.5, dense=1)
    read = [method.keys_read(1000, layer, 4) for layer in range(4)]
    assert read[0] == 1000 and sum(read) <= 2000 and sum(read) > 1990
    method = CACHES[name](tokens=100, dense=1)
    assert [method.keys_read(1000, layer, 4) for layer in range(4)] == [1000, 100, 100, 100]
    with pytest.raises(gs.UsageError, match="fewer dense layers"):
        CACHES[name](density=0.25, dense=1).check_model(4, 2, 16, 4)
    with pytest.raises(gs.UsageError, match="leaves none"):
        CACHES[name](dense=4).check_model(4, 2, 16, 4)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: A.Quest(tokens=15),
        lambda: A.Quest(page=0),
        lambda: A.Quest(density=2.0),
        lambda: A.Quest(dense=-1),
        lambda: A.DoubleSparsity(bits=8),
        lambda: A.DoubleSparsity(factor=0),
        lambda: A.DoubleSparsity(tokens=0),
        lambda: A.DoubleSparsity(factor=17).fitted({0: [A.DoubleSparsity().observe(
            AttentionCall(*(torch.ones(1, 1, 3, 16) for _ in "qkv"), 1.0, True))]}),
        lambda: A.DoubleSparsity().observe(
            AttentionCall(*(torch.ones(1, 1, 3, 16) for _ in "qkv"), 1.0, False)),
        lambda: CACHES["doublesparsity"]().check_model(4, 4, 16, 4),
        lambda: CACHES["doublesparsity"]().check_model(4, 2, 8, 4),
        lambda: CACHES["doublesparsity"]().check_model(4, 2, 16, 5),
    ],
)  # fmt: skip
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        bad()
