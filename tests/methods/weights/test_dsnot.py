"""DSnoT against a plain loop over rows, from any start, and inside the engine."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.core.matrix import inputs_of
from gossamer.core.stats import ColumnNorm, ColumnSum, ColumnVariance, Hessian, together
from gossamer.engine.checks import needs_of, patterns_of
from gossamer.methods import build
from gossamer.ops.select import select

DSnoT = gs.weights.DSnoT


def stats_of(x, sequences, name="layer"):
    parts = []
    for kind in (ColumnNorm(), ColumnSum(), ColumnVariance(), Hessian(torch.float64)):
        state = kind.init(x.shape[1])
        for part in x.chunk(sequences):
            state = kind.update(state, part)
        parts.append(kind.finalize(state, name))
    return replace(together(parts), sequences=sequences)


def problem(rows=20, columns=48, seed=0, mean=1.0):
    """A weight in float64, and 8 sequences of 32 inputs with means of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, columns, generator=generator) * torch.rand(columns, generator=generator)
    x = x + mean * torch.randn(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / 8, x


def by_hand(weight, stats, kept, scores, *, group=0, cycles=50, threshold=0.1, same_sign=False):
    """The mask after the card's steps, one row and one swap at a time; and the error of each row."""
    mask, errors, swaps = kept.clone(), [], 0
    for row in range(len(weight)):
        c = [float(w) * float(s) / stats.sequences for w, s in zip(weight[row], stats.sum)]
        rank = [value / float(v) for value, v in zip(c, stats.variance)]
        wanda = [abs(float(w)) * float(n) for w, n in zip(weight[row], stats.norm)]
        gone = [j for j in range(len(c)) if not kept[row, j]]
        stay = [j for j in range(len(c)) if kept[row, j]]
        first = error = sum(c[j] for j in gone)
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = 1 if error > 0 else -1
            able = [j for j in gone if c[j] * sign > 0]
            if not able:
                break
            grow = max(able, key=lambda j: rank[j] * sign)
            if group:
                near = [j for j in stay if j // group == grow // group]
                order = {j: float(scores[row, j]) for j in near}
            else:
                near = [j for j in stay if c[j] * sign < 0]
                order = {j: wanda[j] for j in near}
            if not near and group:
                gone.remove(grow)
                continue
            if not near:
                break
            prune = min(near, key=order.get)
            after = error + c[prune] - c[grow]
            if same_sign and after * first <= 0:
                break
            error = after
            swaps += 1
            gone.remove(grow)
            stay.remove(prune)
            mask[row, grow], mask[row, prune] = True, False
        errors.append(error)
    return mask, errors, swaps


CASES = {
    "half": (gs.Unstructured("row"), 0.5, {}),
    "sparse": (gs.Unstructured("row"), 0.3, {"threshold": 0.0, "cycles": 7}),
    "tensor": (gs.Unstructured(), 0.4, {}),
    "same sign": (gs.Unstructured("row"), 0.5, {"same_sign": True}),
    "2:4": (gs.NM(2, 4), 0.5, {"same_sign": True}),
    "1:4": (gs.NM(1, 4), 0.25, {"threshold": 0.01, "same_sign": False}),
}


@pytest.mark.parametrize("start", ["wanda", "magnitude", "random"])
@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_a_plain_loop(case, start):
    pattern, density, options = CASES[case]
    weight, x = problem()
    stats = stats_of(x, 8)
    method = DSnoT(build(start), **options)
    scores = method.start.score(weight, stats)
    kept = select(scores, pattern, density).mask
    group = pattern.group if isinstance(pattern, gs.NM) else 0
    want, errors, swaps = by_hand(weight, stats, kept, scores, group=group, **options)
    new, support, told = method.solve_and_report(weight, stats, pattern, density)
    assert torch.equal(support.mask, want) and told["swaps"] == swaps > 10
    assert torch.equal(new, torch.where(want, weight, 0.0))
    assert told["error_after"] == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-6)
    assert torch.equal(support.mask.sum(1), kept.sum(1)), "each row keeps its count"
    if group:
        assert (support.mask.reshape(-1, 4).sum(1) == pattern.keep).all()


@pytest.mark.parametrize("pattern", [gs.Unstructured("row"), gs.NM(2, 4)])
def test_the_mean_error_falls_and_is_what_the_outputs_show(pattern):
    weight, x = problem(64, 96, seed=1)
    new, _, told = DSnoT().solve_and_report(weight, stats_of(x, 8), pattern, 0.5)
    least = 0.9 if isinstance(pattern, gs.NM) else 0.5  # groups leave less to choose from
    assert told["error_after"] < least * told["error_before"]
    shown = (x.double() @ (weight - new).t()).sum(0).abs().mean() / 8
    assert told["error_after"] == pytest.approx(float(shown), rel=1e-4)


def test_inputs_of_mean_zero_and_a_high_threshold_leave_the_start():
    weight, x = problem(mean=0.0)
    x = x - x.mean(0)
    for stats, method in ((stats_of(x, 8), DSnoT()), (stats_of(x + 1, 8), DSnoT(threshold=1e9))):
        pattern = method.default_pattern
        kept = select(gs.weights.Wanda().score(weight, stats), pattern, 0.5).mask
        _, support, told = method.solve_and_report(weight, stats, pattern, 0.5)
        assert torch.equal(support.mask, kept) and told["swaps"] == 0


def test_a_start_that_repairs_keeps_its_repairs_and_is_judged_by_its_own_error():
    weight, x = problem(seed=3)
    stats, pattern = stats_of(x, 8), gs.Unstructured()
    start = gs.weights.SparseGPT()
    repaired, support = start.solve(weight, stats, pattern, 0.4)
    new, after, told = DSnoT(start, threshold=0.01).solve_and_report(weight, stats, pattern, 0.4)
    error = ((weight - repaired) * stats.sum / 8).sum(1).abs().mean()
    assert told["error_before"] == pytest.approx(float(error), rel=1e-5)
    left = ((weight - new) * stats.sum / 8).sum(1).abs().mean()
    assert told["error_after"] == pytest.approx(float(left), rel=1e-5)
    assert told["error_after"] < told["error_before"] and told["swaps"] > 0
    both = support.mask & after.mask
    assert torch.equal(new[both], repaired[both])
    grown = after.mask & ~support.mask
    assert grown.any() and torch.equal(new[grown], weight[grown])


def test_variance_inside_batches_leaves_the_spread_between_them_out():
    weight, x = problem(seed=4)
    drift = torch.arange(8).repeat_interleave(32)[:, None] * (torch.arange(48) % 5)
    stats = stats_of(x + drift, 8)
    parts = (x + drift).chunk(8)
    within = torch.stack([part.var(0, correction=0) for part in parts]).mean(0)
    torch.testing.assert_close(stats.within, within)
    pooled, inside = (DSnoT(variance=name) for name in ("pooled", "within"))
    masks = [m.solve(weight, stats, gs.NM(2, 4), 0.5)[1].mask for m in (pooled, inside)]
    assert not torch.equal(*masks)


def test_it_has_the_needs_the_patterns_and_the_default_of_its_start():
    assert needs_of(DSnoT()) == ("norm", "sum", "variance")
    assert "hessian" in needs_of(DSnoT(gs.weights.SparseGPT()))
    assert "hessian" in needs_of(DSnoT(DSnoT(gs.weights.SparseGPT())))
    assert patterns_of(DSnoT()) == ("unstructured", "nm")
    assert DSnoT().default_pattern == gs.Unstructured("row")
    assert DSnoT(gs.weights.Magnitude()).default_pattern == gs.Unstructured()


def test_its_start_is_named_in_words():
    assert build("dsnot") == build("dsnot:start=wanda") == DSnoT()
    want = DSnoT(gs.weights.SparseGPT(64, 0.02), cycles=20, skip=None)
    text = "dsnot:start.damping=0.02,start=sparsegpt,cycles=20,start.block=64,skip=none"
    assert build(text) == want
    assert build("dsnot:start.scope=tensor").start == gs.weights.Wanda("tensor")
    assert build("dsnot:start=dsnot,start.start=weights.magnitude").start.start == build(
        "magnitude"
    )
    assert build("widths:scorer=random,scorer.seed=3") == gs.weights.Widths(gs.weights.Random(3))
    for text, message in {
        "dsnot:start=sparsegpt:block=64": r"start=sparsegpt,start\.block=64",
        "dsnot:start=wonda": "did you mean 'wanda'",
        "dsnot:start.blok=3": "unknown option of wanda",
        "dsnot:cycles.x=3": "cycles is no method",
        "dsnot:start=rigl": "rigl",
        "dsnot:start=monarch": "starts from a scorer or solver",
    }.items():
        with pytest.raises(gs.UsageError, match=message):
            build(text)


def test_what_cannot_be_right_is_refused():
    weight, x = problem()
    stats = stats_of(x, 8, "h.0.fc")
    for pattern in (gs.Unstructured("column"), gs.Block(1, 4)):
        with pytest.raises(gs.PatternError, match=r"h\.0\.fc: DSnoT swaps weights inside rows"):
            DSnoT().solve(weight, stats, pattern, 0.5)
    with pytest.raises(gs.UsageError, match="how many sequences"):
        DSnoT().solve(weight, replace(stats, sequences=0), gs.NM(2, 4), 0.5)
    for bad in ({"start": gs.weights.Wanda}, {"start": gs.weights.RigL(0.1)}, {"start": "wanda"}):
        with pytest.raises(gs.UsageError, match="scorer or solver"):
            DSnoT(**bad)
    for bad in ({"cycles": -1}, {"threshold": float("nan")}, {"variance": "mean"}):
        with pytest.raises(gs.UsageError, match="DSnoT"):
            DSnoT(**bad)


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 256, (2, 24), generator=generator)} for _ in range(count)
    ]


def test_the_engine_gathers_what_both_need_and_tells_what_was_swapped(tiny_llama):
    model = tiny_llama()
    first = gs.prune(copy.deepcopy(model), "wanda", density=0.5, data=batches())
    method = DSnoT(threshold=0.0, same_sign=True)
    result = gs.prune(model, method, density=0.5, data=batches())
    assert set(result.figures) == set(result.supports)
    for name, told in result.figures.items():
        if ".mlp." in name:
            assert told == {"swaps": 0}
        else:
            assert told["swaps"] > 0 and told["error_after"] < told["error_before"]
    block = [name for name in result.supports if ".layers.0.self_attn" in name]
    for name in block:  # the first block is given the same inputs by both
        moved = result.supports[name].mask ^ first.supports[name].mask
        assert int(moved.sum()) == 2 * result.figures[name]["swaps"]
    assert result.measured_density == first.measured_density
    swaps = sum(told["swaps"] for told in result.figures.values())
    assert f"dsnot: {swaps:,} swaps in 8 of 14 layers" in str(result)


def test_a_journal_keeps_the_figures(tiny_llama, tmp_path):
    model = tiny_llama()
    again = copy.deepcopy(model)
    first = gs.prune(model, DSnoT(), pattern="2:4", data=batches(), journal=tmp_path)
    second = gs.prune(again, DSnoT(), pattern="2:4", data=batches(), journal=tmp_path)
    assert second.provenance["resumed_units"] > 0 and second.figures == first.figures
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_sequences_are_those_of_the_model_s_batches(monkeypatch):
    """A convolution and an expert see more or fewer rows than the model is given inputs."""
    seen = {}
    solve = DSnoT.solve_and_report

    def watch(self, weight, stats, pattern, density):
        seen[stats.name] = stats
        return solve(self, weight, stats, pattern, density)

    monkeypatch.setattr(DSnoT, "solve_and_report", watch)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 8))
    x = [torch.randn(5, 4, 6, 6), torch.randn(2, 4, 6, 6)]
    gs.prune(model, DSnoT(), density=0.5, data=x)
    assert [(s.sequences, s.count) for s in seen.values()] == [(7, 7 * 16), (7, 7)]
    patches = inputs_of(model[0], torch.cat(x))
    torch.testing.assert_close(seen["0"].sum, patches.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["0"].variance, patches.var(0, correction=0))
