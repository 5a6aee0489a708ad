"""Sirius: dense checks, rolled-back caches, and the density that is really read."""

import pytest
import torch

import gossamer as gs

A = gs.activations
LOOSE = A.CoreInfer(0.15, first=0.0, last=1.0)


def prompt(length=12, seed=0):
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed))


def prompts():
    return [torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(7))]


def sharp(model):
    """With larger logits, so that choices are not near ties."""
    with torch.no_grad():
        model.lm_head.weight *= 30
    return model


@pytest.mark.parametrize("period", [1, 2, 5, 16])
@pytest.mark.parametrize("start", ["teal", "coreinfer", "wina"])
def test_only_first_choices_give_the_dense_text(tiny_llama, start, period):
    model, ids = sharp(tiny_llama()), prompt()
    first, data = {
        "teal": (A.TEAL(0.3, allocation="uniform"), prompts()),
        "wina": (A.WINA(0.3, allocation="uniform"), prompts()),
        "coreinfer": (LOOSE, None),
    }[start]
    want = gs.generate(model, ids, 30, eos=())
    found = gs.generate_corrected(
        model, A.Sirius(first, period, accept=1), ids, 30, data, break_even=float("inf")
    )
    assert torch.equal(found.ids, want)
    assert found.checks >= 29 / period and found.sparse.density < 0.7


def test_the_sparse_text_alone_is_another(tiny_llama):
    model, ids = sharp(tiny_llama()), prompt()
    with gs.sparsify_activations(model, LOOSE):
        sparse = gs.generate(model, ids, 30, eos=())
    assert not torch.equal(sparse, gs.generate(model, ids, 30, eos=()))
    found = gs.generate_corrected(model, A.Sirius(LOOSE, 8, accept=0), ids, 30)
    assert found.taken_back == 0 and found.advance == pytest.approx(29 / 4)
    accepted = gs.generate_corrected(model, A.Sirius(LOOSE, 8, accept=0.3), ids, 30)
    strict = gs.generate_corrected(model, A.Sirius(LOOSE, 8, accept=1), ids, 30)
    assert strict.advance <= accepted.advance <= found.advance
    assert strict.effective_density >= accepted.effective_density >= found.effective_density


def test_the_effective_density_counts_checks_and_vain_steps(tiny_llama):
    model = sharp(tiny_llama())
    found = gs.generate_corrected(model, A.Sirius(LOOSE, 4, accept=1), prompt(), 21)
    gained = round(found.advance * found.checks)
    assert gained >= 20
    wrote = found.sparse.ways["sliced"] / len(model.model.layers)
    want = (wrote * found.sparse.density + found.checks) / gained
    assert found.effective_density == pytest.approx(want)
    assert found.effective_density > found.sparse.density


def test_checks_refresh_the_cache(tiny_llama):
    """What stands in the cache behind a check is what a dense pass over the text gives."""
    from gossamer.engine.inputs.activations.correct import _Writer

    model, ids = sharp(tiny_llama()), prompt()
    method = A.Sirius(LOOSE, 6, accept=0.2)
    with torch.no_grad(), gs.sparsify_activations(model, LOOSE) as run:
        writer = _Writer(model, run.dense, method)
        writer.read_prompt(ids)
        for _ in range(4):
            writer.round(100)
        text = torch.cat([ids, torch.tensor([writer.text[:-1]])], dim=1)
        with run.dense():
            want = model(text, use_cache=True).past_key_values
        assert writer.cache.get_seq_length() == text.shape[1]
        for found, dense in zip(writer.cache.layers, want.layers, strict=True):
            torch.testing.assert_close(found.keys, dense.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.values, dense.values, rtol=1e-4, atol=1e-5)


def test_end_tokens_end(tiny_llama):
    model, ids = sharp(tiny_llama()), prompt()
    want = gs.generate(model, ids, 30, eos=())
    end = int(want[0, ids.shape[1] + 9])
    found = gs.generate_corrected(model, A.Sirius(LOOSE, 4, accept=1), ids, 30, eos=[end])
    assert int(found.ids[0, -1]) == end
    assert torch.equal(found.ids, want[:, : found.ids.shape[1]])


@pytest.mark.parametrize(
    "bad", [{"period": 0}, {"period": 1.5}, {"accept": 2}, {"accept": -0.1}, {"temperature": 0}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        A.Sirius(**bad)


def test_bad_calls_are_refused(tiny_llama):
    model = tiny_llama(positions=64)
    for ids, count, method in (
        (prompt().repeat(2, 1), 5, A.Sirius(LOOSE)),
        (prompt(), 0, A.Sirius(LOOSE)),
        (prompt(), 5, LOOSE),
        (prompt(40), 20, A.Sirius(LOOSE, 16)),
    ):
        with pytest.raises(gs.UsageError):
            gs.generate_corrected(model, method, ids, count)
    with pytest.raises(gs.UsageError, match="calibration data"):
        gs.generate_corrected(model, "sirius", prompt(), 5)
