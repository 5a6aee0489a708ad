"""Comparisons of attention: what is counted is counted right, parts are kept, figures follow."""

import json
import math
from dataclasses import replace

import pytest
import torch

import gossamer as gs
from gossamer.attention_comparison import Everything, Reader
from gossamer.core.errors import UsageError
from gossamer.engine.measure.frontier import Point, at_density, fit, means, pareto

pytest.importorskip("transformers")


def point(density=0.5, score=0.5, **other):
    facts = {
        "model": "m", "method": "blocksparse", "setting": f"s{density}", "task": "needle", "length": 64, "seed": 0,
        "parameters": 1000, "linear": 100.0, "attention": 100 * density, "indexing": 0.0, "decode_bytes": 1.0,
        "seconds": 1.0,
    }  # fmt: skip
    return Point(**{**facts, "density": density, "score": score, **other})


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Task:
    """Scores the largest logit of the last place; counts how often it is read."""

    name, length, better = "largest", 80, "higher"

    def __init__(self):
        self.reads = 0

    def score(self, reader, seed):
        self.reads += 1
        ids = torch.randint(48, (1, self.length), generator=torch.Generator().manual_seed(seed))
        first = float(reader.read(ids).max())
        return first + 0 * float(reader.go_on(ids[:, :1]).max())


def test_a_point_counts_the_whole_prefill(llama):
    found = gs.compare_attention(
        llama, {"streamingllm": ["streamingllm:window=16,block=16"]}, [Task()], seeds=[0]
    )
    dense, window = found.points
    n = 80
    blocks = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # weights of two blocks
    head = 48 * 32
    for one in (dense, window):
        assert one.parameters == blocks + head
        assert one.linear == 2 * (blocks * n + head)
        assert one.decode_bytes == 4 * (blocks + head + 2 * 2 * 2 * 8 * n)
    assert dense.density == 1 and dense.attention == 4 * 8 * 4 * 2 * n * (n + 1) / 2
    kept = sum(min(i + 1, 16) + min(4, max(0, i - 15)) for i in range(n))
    assert window.density == pytest.approx(kept / (n * (n + 1) / 2))
    assert window.attention == pytest.approx(window.density * dense.attention)
    assert window.indexing == 0 and window.flops == window.linear + window.attention


def test_choosing_is_counted(llama):
    found = gs.compare_attention(
        llama, {"blocksparse": ["blocksparse:block=16,density=0.5"]}, [Task()], seeds=[0]
    )
    assert found.points[1].indexing > 0


def test_dense_is_the_models_own_attention(llama):
    ids = torch.arange(40).unsqueeze(0)
    reader = Reader(llama, Everything())
    torch.testing.assert_close(
        reader.read(ids, every=True), llama(ids).logits, rtol=1e-4, atol=1e-5
    )
    more = torch.tensor([[3, 4]])
    whole = llama(torch.cat([ids, more], 1)).logits[:, -1:]
    torch.testing.assert_close(reader.go_on(more), whole, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_goes_on(llama, tmp_path):
    methods = {"streamingllm": ["streamingllm:window=16,block=16"]}
    task, keep = Task(), tmp_path / "points.json"
    first = gs.compare_attention(llama, methods, [task], seeds=[0], keep=keep)
    assert task.reads == 2
    both = gs.compare_attention(llama, methods, [task], seeds=[0, 1], keep=keep)
    assert task.reads == 4 and both.points[:2] == first.points
    assert len(json.loads(keep.read_text())) == 4
    keep.write_text('{"a": 1}')
    with pytest.raises(UsageError, match="no points"):
        gs.compare_attention(llama, methods, [task], keep=keep)


def test_nothing_to_compare_is_refused(llama):
    with pytest.raises(UsageError, match="one task"):
        gs.compare_attention(llama, {"a": []}, [Task()])


def test_scores_at_a_density_lie_between_neighbours():
    points = [point(0.1, 0.2), point(0.4, 0.8), point(1.0, 1.0, method="dense")]
    assert at_density(points, 0.2) == pytest.approx(0.5)  # halfway on a logarithmic scale
    assert at_density(points, 0.1) == pytest.approx(0.2)
    assert at_density(points, 1.0) == pytest.approx(1.0)
    assert at_density(points, 0.05) is None
    assert at_density(points, 0.4, lambda p: p.attention) == pytest.approx(40)


def test_the_front_has_no_point_that_another_beats():
    generator = torch.Generator().manual_seed(0)
    points = [point(float(d), float(s)) for d, s in torch.rand(40, 2, generator=generator).tolist()]
    for better, sign in (("higher", 1), ("lower", -1)):
        front = pareto(points, lambda p: p.flops, better)
        for one in points:
            beaten = any(
                o.flops <= one.flops and sign * o.score >= sign * one.score and o != one
                for o in points
            )
            assert (one in front) == (not beaten)


def test_means_are_over_what_is_named():
    points = [point(0.2, s, seed=i, task=t) for t in "ab" for i, s in enumerate((0.0, 1.0))]
    each = means(points)
    assert [(p.task, p.score, p.seed) for p in each] == [("a", 0.5, -1), ("b", 0.5, -1)]
    (whole,) = means(points, ("seed", "task"))
    assert whole.task == "all tasks" and whole.score == 0.5


def law_points(noise=0.0):
    generator = torch.Generator().manual_seed(1)
    found = []
    for parameters in (100, 1000):
        for length in (256, 512, 1024):
            for density in (0.05, 0.1, 0.2, 0.4, 0.8):
                logit = -4 + 1.2 * math.log(parameters) - 0.3 * math.log(length)
                logit -= 0.7 * math.log(1 / density)
                logit += noise * float(torch.randn((), generator=generator))
                found.append(point(density, 1 / (1 + math.exp(-logit)), length=length,
                                   parameters=parameters))  # fmt: skip
    return found


def test_the_fit_finds_a_law_that_is_there_and_predicts_the_extremes():
    points = [p for p in law_points() if 0.01 < p.score < 0.99]
    law = fit(points, ridge=1e-9)
    assert (law.size, law.length, law.sparsity) == pytest.approx((1.2, -0.3, -0.7), abs=1e-4)
    assert law.constant == pytest.approx(-4, abs=1e-3)
    assert law.held_out >= 5 and law.held_out_residual < 1e-4 < law.spread
    noisy = fit([replace(p, score=0.5) if p.density == 0.05 else p for p in points])
    assert noisy.held_out_residual > 0.05
    with pytest.raises(UsageError, match="4 points"):
        fit(points[:3])


def test_a_comparison_is_drawn_and_saved(tmp_path):
    points = [point(1.0, 0.9, method="dense", setting="dense")]
    points += [point(d, d, seed=s) for d in (0.2, 0.6) for s in (0, 1)]
    found = gs.AttentionComparison(tuple(points), {"needle": "higher"})
    (row,) = found.at(0.6)
    assert row["value"] == pytest.approx(0.6) and row["method"] == "blocksparse"
    assert [p.density for p in found.front("needle", 64)] == [0.2, 0.6, 1.0]
    for ending in ("html", "svg", "json"):
        found.save(tmp_path / f"a.{ending}")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("<title>") == 3 and "needle, 64 tokens" in drawn
    assert "<table" in (tmp_path / "a.html").read_text()
    assert len(json.loads((tmp_path / "a.json").read_text())) == 5
    with pytest.raises(UsageError, match="saved as"):
        found.save(tmp_path / "a.txt")
    assert "needle, 64 tokens" in str(found)
