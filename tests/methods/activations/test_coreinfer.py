"""CoreInfer: the prompt's neurons, their slices, and what a shift of subject does."""

import pytest
import torch
from torch import nn

import gossamer as gs

EVERYWHERE = {"first": 0.0, "last": 1.0}


def prompt(length=20, batch=1, seed=0):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_neurons_are_those_that_most_tokens_name():
    activations = torch.zeros(6, 10)
    activations[:, 4] = 5  # each token names its two largest: four name this one
    activations[:4, 7] = 6  # and four this one
    activations[:2, 1] = 9  # the largest, but two name it
    method = gs.activations.CoreInfer(0.2, token_share=1.0)
    assert method.neurons(activations).tolist() == [4, 7]
    assert gs.activations.CoreInfer(0.3, token_share=1.0).neurons(activations).tolist() == [1, 4, 7]
    kept = gs.activations.CoreInfer(0.5, token_share=1.0).neurons(activations)
    assert len(kept) == 5  # fewer are named than the budget holds: it is filled


def test_signs_count_by_value_alone():
    activations = torch.tensor([[3.0, -9.0, 1.0, 0.0]])
    size = gs.activations.CoreInfer(0.25, token_share=1.0)
    positive = gs.activations.CoreInfer(0.25, token_share=1.0, by="positive")
    assert size.neurons(activations).tolist() == [1]
    assert positive.neurons(activations).tolist() == [0]


def test_decoding_is_the_masked_network(tiny_llama):
    model, ids = tiny_llama(), prompt()
    method = gs.activations.CoreInfer(0.4, **EVERYWHERE)
    with torch.no_grad():
        dense = model(ids, use_cache=True)
        with gs.sparsify_activations(model, method) as run:
            out = model(ids, use_cache=True)
            assert torch.equal(out.logits, dense.logits)  # the prompt is read densely
            token = torch.tensor([[5]])
            found = model(token, past_key_values=out.past_key_values).logits
            chosen = [network.chosen[0] for network in run.networks]
        masks = [torch.zeros(128).index_fill(0, index, 1) for index in chosen]
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, m=mask: (x[0] * m,))
            for layer, mask in zip(model.model.layers, masks, strict=True)
        ]
        want = model(token, past_key_values=dense.past_key_values).logits
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    told = run.result
    assert told.ways == {"prompt": 2, "sliced": 2}
    assert told.density == pytest.approx(51 / 128) and told.bytes < 0.41 * told.dense_bytes
    assert told.held_bytes == pytest.approx(0.4 * told.dense_bytes, rel=0.02)


def test_texts_of_a_batch_choose_for_themselves(tiny_llama):
    model, ids = tiny_llama(), prompt(batch=3)
    method = gs.activations.CoreInfer(0.3, **EVERYWHERE)
    with gs.sparsify_activations(model, method) as run:
        together = gs.generate(model, ids, 5, eos=())
        assert run.result.union > run.result.density
        alone = torch.cat([gs.generate(model, row, 5, eos=()) for row in ids.split(1)])
    assert torch.equal(together, alone)


def test_every_neuron_is_dense_and_the_model_comes_back(tiny_llama):
    model, ids = tiny_llama(), prompt()
    want = gs.generate(model, ids, 6, eos=())
    with gs.sparsify_activations(model, gs.activations.CoreInfer(1.0, **EVERYWHERE)):
        assert torch.equal(gs.generate(model, ids, 6, eos=()), want)
    assert torch.equal(gs.generate(model, ids, 6, eos=()), want)
    assert all("forward" not in vars(module) for module in model.modules())


def test_only_the_middle_of_the_depth_is_served(tiny_llama):
    model = tiny_llama(layers=8)
    with gs.sparsify_activations(model, "coreinfer") as run:
        model(prompt())
    assert [network.name for network in run.networks] == [
        f"model.layers.{place}.mlp" for place in range(1, 7)
    ]


class Topics(nn.Module):
    """A ReLU network whose neurons belong to two subjects, each with directions of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(128, 32)
        with torch.no_grad():
            self.fc1.weight[:64, 16:] *= 0.05
            self.fc1.weight[64:, :16] *= 0.05
            self.fc1.bias.fill_(-0.1)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))

    def text(self, subject, tokens=40, seed=0):
        x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed))
        x[..., 16:] *= float(subject)
        x[..., :16] *= 1 - float(subject)
        return x * 3


def test_the_prompt_s_neurons_serve_its_subject_and_not_another():
    model = Topics()

    def error(neurons, x):
        hidden = torch.relu(model.fc1(x))
        kept = torch.zeros(128).index_fill(0, neurons, 1)
        return float(
            (model.fc2(hidden * kept) - model.fc2(hidden)).norm() / model.fc2(hidden).norm()
        )

    method = gs.activations.CoreInfer(0.4, by="positive")
    with torch.no_grad():
        prompts = [model.text(0), model.text(1, seed=1)]
        both = torch.relu(model.fc1(torch.cat(prompts, dim=1)))[0]
        core = method.neurons(torch.relu(model.fc1(prompts[0]))[0])
        common = method.neurons(both)
        drawn = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:51]
        same = [error(index, model.text(0, seed=9)) for index in (core, common, drawn)]
        other = [error(index, model.text(1, seed=9)) for index in (core, common)]
    assert same[0] < same[1] < same[2]
    assert other[0] > other[1]  # what the prompt chose is worse where the subject changes


@pytest.mark.parametrize(
    "bad", [{"density": 0}, {"token_share": 2}, {"by": "sign"}, {"first": 0.9, "last": 0.1}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(gs.UsageError):
        gs.activations.CoreInfer(**bad)


def test_what_it_cannot_serve_is_refused(tiny_llama):
    with (
        pytest.raises(gs.UsageError, match="no feed-forward network"),
        gs.sparsify_activations(nn.Sequential(nn.Linear(8, 8)), "coreinfer"),
    ):
        pass
    with (
        pytest.raises(gs.UsageError, match="from each prompt"),
        gs.sparsify_activations(tiny_llama(), "coreinfer", [prompt()]),
    ):
        pass
    with pytest.raises(gs.UsageError, match="from each prompt"):
        gs.calibrate_activations(tiny_llama(), "coreinfer", [prompt()])
    model = tiny_llama()
    with (
        pytest.raises(gs.UsageError, match="no prompt of two tokens"),
        gs.sparsify_activations(model, gs.activations.CoreInfer(**EVERYWHERE)),
    ):
        model(torch.tensor([[1]]))
    assert all("forward" not in vars(module) for module in model.modules())
