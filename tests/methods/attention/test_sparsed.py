"""SparseD: which steps are dense, what is kept, and a prompt that starves nobody."""

import pytest
import torch

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.core.denoising import DenoisingStep
from gossamer.methods.attention.steps import dense


def call_of(length, heads=4, kv_heads=2, seed=0, width=16):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(1, h, length, width, generator=generator) for h in (heads, kv_heads, kv_heads)
    ]
    return AttentionCall(2 * parts[0], parts[1], parts[2], width**-0.5, False)


def best(weights, count):
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def means_of(weights, block):
    """The mean of each tile, over real entries."""
    rows = [
        torch.stack([tile.mean((2, 3)) for tile in part.split(block, dim=3)], dim=-1)
        for part in weights.split(block, dim=2)
    ]
    return torch.stack(rows, dim=2)


def maps(call, first=0):
    key = call.key.repeat_interleave(2, dim=1)[:, :, first:]
    return (call.query @ key.transpose(-1, -2) * call.scale).softmax(-1)


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_blocks_are_those_with_the_highest_mean(length, share):
    call = call_of(length)
    found = gs.attention.SparseD(share, block=8).choose(call, dense(call)[1])
    blocks = -(-length // 8)
    assert torch.equal(found, best(means_of(maps(call), 8), int(blocks * share) + 1))
    assert (found.sum(-1) == int(blocks * share) + 1).all()


def test_a_ragged_last_block_is_ranked_by_its_real_entries():
    call = call_of(65)
    call.query.add_(0.5)
    call.key[:, :, 64] = 1.0  # one token wanted by all
    weights = means_of(maps(call), 8)
    found = gs.attention.SparseD(0.1, block=8).choose(call, dense(call)[1])
    assert torch.equal(found[..., 8], best(weights, 1)[..., 8])
    padded = weights.clone()
    padded[..., 8] /= 8
    assert found[..., 8].sum() > best(padded, 1)[..., 8].sum()


@pytest.mark.parametrize("prompt", [32, 37])
def test_a_loud_prompt_leaves_the_generated_part_its_share(prompt):
    call = call_of(64)
    call.key[:, :, :32] *= 4  # the prompt draws all attention
    together = gs.attention.SparseD(0.3, block=8).choose(call, dense(call)[1])
    apart = gs.attention.SparseD(0.3, block=8, prompt=prompt).choose(call, dense(call)[1])
    assert together[..., 4:].sum() < 0.1 * together.sum()
    assert (apart[..., 4:].sum(-1) == int(4 * 0.3) + 1).all()
    assert torch.equal(apart[..., :4], together[..., :4])
    wanted = best(means_of(maps(call, first=32), 8), int(4 * 0.3) + 1)
    assert torch.equal(apart[..., 4:], wanted)


@pytest.mark.parametrize(("total", "first", "last"), [(10, 0.2, 3), (7, 0.2, 2), (20, 0.0, 1)])
def test_early_steps_are_dense_then_one_choice_stays(total, first, last):
    method, state, kinds, states = gs.attention.SparseD(0.3, 8, first), None, [], []
    for number in range(total):
        found = method.attend(call_of(64, seed=number), DenoisingStep(number, total), state)
        state = found.state
        kinds.append(found.kind)
        states.append(state)
    assert kinds == ["dense"] * (last + 1) + ["reused"] * (total - last - 1)
    assert states[:last] == [None] * last and all(x is states[last] for x in states[last:])
    wanted = method.choose(call_of(64, seed=last), dense(call_of(64, seed=last))[1])
    assert states[last].blocks.numel() == wanted.sum()


def test_a_run_that_begins_late_chooses_in_its_first_step():
    method = gs.attention.SparseD(0.3, 8)
    found = method.attend(call_of(64), DenoisingStep(8, 10), None)
    assert found.kind == "dense" and found.state is not None
    assert method.attend(call_of(64), DenoisingStep(9, 10), found.state).kind == "reused"


def test_a_prompt_longer_than_the_text_is_named():
    with pytest.raises(gs.UsageError, match="a prompt of 65 tokens in a text of 64"):
        gs.attention.SparseD(prompt=65).choose(call_of(64), dense(call_of(64))[1])
    whole = gs.attention.SparseD(0.3, 8, prompt=64).choose(call_of(64), dense(call_of(64))[1])
    assert torch.equal(
        whole, gs.attention.SparseD(0.3, 8).choose(call_of(64), dense(call_of(64))[1])
    )


@pytest.mark.parametrize(
    "bad", [{"share": 0}, {"block": 0}, {"first": 1.5}, {"prompt": -1}, {"prompt": 2.5}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        gs.attention.SparseD(**bad)


def test_a_model_of_transformers_is_served():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 64, (2, 64))
    with gs.sparse_denoising(model, "sparsed:share=0.2,block=8", steps=10) as run, torch.no_grad():
        for number in range(10):
            run.step(number)
            logits = model(ids).logits
    assert logits.isfinite().all()
    assert run.result.layers == 2 and run.result.reused_calls == 2 * 6
    assert run.result.sparse_density == pytest.approx(2 / 8)
