"""Activation sparsity inside models: where it runs, what it costs, and what is refused."""

import gc
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn.active import DENSE, ONE

ANY = {"break_even": float("inf")}


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


def prompts(count=2, length=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (4, length), generator=generator) for _ in range(count)]


def uniform(density=0.5):
    return gs.activations.TEAL(density, allocation="uniform")


def test_decoding_skips_and_prompts_stay_dense(model):
    ids = prompts()[0][:1, :20]
    with torch.no_grad():
        dense = model(ids).logits
        with gs.sparsify_activations(model, uniform(), prompts(), **ANY) as run:
            assert torch.equal(model(ids).logits, dense)  # a prompt, bit for bit
            gs.generate(model, ids, 5, eos=())
    layers = 7 * len(model.model.layers)
    assert run.result.ways == {DENSE: 2 * layers, ONE: 4 * layers}
    assert 0.3 < run.result.density < 0.6 and run.result.union == run.result.density


def test_bytes_are_those_of_kept_weights(model):
    with gs.sparsify_activations(model, uniform(), prompts(), **ANY) as run:
        gs.generate(model, prompts()[0][:1, :20], 5, eos=())
    told = run.result
    every = sum(p.numel() * 4 for n, p in model.named_parameters() if "_proj" in n)
    assert told.dense_bytes == every and told.added_bytes == told.held_bytes == 0
    assert told.bytes == pytest.approx(told.density * every, rel=1e-3)


def test_one_copy_of_each_weight(model):
    held = {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()}
    with gs.sparsify_activations(model, uniform(), prompts(), **ANY) as run:
        model(prompts()[0])
        for name, product in run.products.items():
            weight = model.get_parameter(f"{name}.weight")
            assert product.columns.values.data_ptr() == weight.data_ptr()
            assert product.columns.values.is_contiguous()
        assert {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()} == held


def live():
    """Bytes of every tensor that anything holds on to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    storages = [x.untyped_storage() for x in held if x.device.type == "cpu"]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def test_memory_does_not_grow():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6)))  # 100 MB
    data = [torch.randn(40, 2048)]
    with torch.no_grad():
        model(data[0])
        before, tensors = resident(), live()
        plan = gs.calibrate_activations(model, uniform(), data)
        with gs.sparsify_activations(model, plan, **ANY) as run:
            model(data[0][:1])
            assert resident() - before < 40e6  # one weight is being transposed at most
            assert live() - tensors < 1e6
        assert live() - tensors < 1e6 and run.result.ways == {ONE: 6}
        fast = gs.compress(model, activations=plan, latency="rule")
        assert live() - tensors < 1e6 and len(fast.layers) == 6


def test_a_batch_of_texts_decodes_as_each_alone(model):
    ids = prompts()[0][:3, :20]
    with gs.sparsify_activations(model, uniform(0.6), prompts(), **ANY) as run:
        together = gs.generate(model, ids, 6, eos=())
        alone = torch.cat([gs.generate(model, row, 6, eos=()) for row in ids.split(1)])
    assert torch.equal(together, alone)
    assert run.result.union > run.result.density
    assert {"one token", "dense"} <= set(run.result.ways)


def test_the_loss_is_told_and_grows(model):
    found = []
    for density in (0.9, 0.2):
        with gs.sparsify_activations(model, uniform(density), prompts(), **ANY) as run:
            model(prompts()[0])
        found.append(run.result.loss)
        assert run.result.ways == {DENSE: 14}  # the measurement itself does not count
    with torch.no_grad():
        logits = torch.cat([model(ids).logits[:, :-1] for ids in prompts()])
    wanted = torch.cat([ids[:, 1:] for ids in prompts()])
    want = float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    assert found[0][0] == found[1][0] == pytest.approx(want, rel=1e-5)
    assert abs(found[0][1] - want) < abs(found[1][1] - want)


def test_padding_counts_for_nothing(model):
    ids = prompts()[0]
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    other = ids.clone()
    other[:, 30:] = 7
    plans = [
        gs.calibrate_activations(
            model, uniform(), [{"input_ids": each, "attention_mask": mask}]
        ).to_json()
        for each in (ids, other)
    ]
    assert plans[0] == plans[1]


def test_layers_above_break_even_stay_dense(model):
    ids = prompts()[0][:1, :20]
    want = gs.generate(model, ids, 5, eos=())
    with gs.sparsify_activations(model, uniform(), prompts(), break_even=0.4) as run:
        assert torch.equal(gs.generate(model, ids, 5, eos=()), want)
    assert not run.products
    assert all("slower, break-even 0.40" in layer.served for layer in run.result.layers)
    assert run.result.bytes == run.result.dense_bytes


def test_break_even_is_timed(model):
    with gs.sparsify_activations(model, uniform(), prompts()) as run:
        model(prompts()[0])
    for layer in run.result.layers:
        assert layer.served == "columns" or "break-even" in layer.served


def test_full_density_leaves_the_model_as_it_is(model):
    ids = prompts()[0][:1]
    with torch.no_grad():
        want = model(ids[:, :1]).logits
        with gs.sparsify_activations(model, uniform(1.0), prompts()):
            assert torch.equal(model(ids[:, :1]).logits, want)


def test_a_model_that_is_not_sparse_enough_is_told_so(model):
    with gs.sparsify_activations(model, uniform(0.02), prompts(), **ANY) as run:
        model(prompts()[0])
    text = str(run.result)
    assert "no layer has inputs that are zero by themselves" in text
    relu = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    data = [torch.randn(100, 32)]
    with torch.no_grad(), gs.sparsify_activations(relu, uniform(), data, **ANY) as run:
        relu(torch.randn(1, 32))
    assert "zero by themselves" not in str(run.result)
    assert run.result.layers[1].zeros == pytest.approx(0.5, abs=0.1)


def test_a_block_without_a_call_is_an_error(model):
    with (
        pytest.raises(gs.UsageError, match="none of 14 layers was called"),
        gs.sparsify_activations(model, uniform(), prompts(), **ANY),
    ):
        pass


def test_other_weights_are_refused_and_simulated(model):
    half = model.to(torch.float64)
    data = prompts()
    with (
        pytest.raises(gs.UsageError, match=r"float32 and bfloat16.*simulate=True"),
        gs.sparsify_activations(half, uniform(), data),
    ):
        pass
    with gs.sparsify_activations(half, uniform(), data, simulate=True) as run:
        gs.generate(half, data[0][:1, :20], 3, eos=())
    assert {layer.served for layer in run.result.layers} == {"masked"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": None}, "needs calibration data"),
        ({"data": [torch.randint(256, (1, 10))]}, "calibration saw 10 tokens"),
        ({"data": []}, "empty"),
        ({"density": 0.0}, "density"),
        ({"prefill": "both"}, "prefill is 'dense' or 'sparse'"),
        ({"break_even": -1}, "break_even"),
        ({"exclude": ["nothing"]}, "matches no layer"),
        ({"exclude": ["*_proj"]}, "."),
        ({"method": "wanda"}, "is one of weights"),
        ({"method": gs.activations.TEAL}, "pass an instance"),
        ({"method": gs.weights.Wanda()}, "chooses no inputs"),
        ({"method": "teal:threshold=3"}, "unknown option"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_changes(model, changes, match):
    before = {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    given = {"method": uniform(), "data": prompts(), **changes}
    with (
        pytest.raises(gs.UsageError, match=match),
        gs.sparsify_activations(model, given.pop("method"), given.pop("data"), **given),
    ):
        pass
    assert {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()} == before


def test_thresholds_of_another_model_are_refused(model, tiny_llama, tmp_path):
    path = gs.calibrate_activations(model, uniform(), prompts()).save(tmp_path / "plan.json")
    assert gs.load_activations(path, model)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.1
    for wrong, why in ((other, "weights differ"), (tiny_llama(width=32), "here"),
                       (tiny_llama(layers=1), "no such layer")):  # fmt: skip
        with pytest.raises(gs.UsageError, match=f"another model.*{why}"):
            gs.load_activations(path, wrong)
    plan = gs.load_activations(path, model)
    with pytest.raises(gs.UsageError, match="another model"), gs.sparsify_activations(other, plan):
        pass
    with (
        pytest.raises(gs.UsageError, match=r"belong to gs\.calibrate_activations"),
        gs.sparsify_activations(model, plan, density=0.3),
    ):
        pass


def test_a_file_that_is_none_of_thresholds_is_refused(model, tmp_path):
    path = tmp_path / "plan.json"
    good = gs.calibrate_activations(model, uniform(), prompts()).to_json()
    layer = next(iter(good["layers"]))
    bent = {**good["layers"][layer], "threshold": "high"}
    for bad in (
        "{", "[]", json.dumps({**good, "version": 9}), json.dumps({**good, "more": 1}),
        json.dumps({**good, "layers": {layer: {}}}),
        json.dumps({**good, "layers": {**good["layers"], layer: bent}}),
    ):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(gs.FormatError):
            gs.load_activations(path, model)


def test_nan_in_calibration_is_named(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(gs.NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        gs.calibrate_activations(model, uniform(), prompts())


def test_gradients_go_through_masks(model):
    with gs.sparsify_activations(model, uniform(), prompts(), **ANY) as run:
        x = torch.randn(1, 64, requires_grad=True)
        run.products["model.layers.0.mlp.up_proj"](x).sum().backward()
        assert int((x.grad == 0).sum()) > 0
    assert run.result.ways == {"masked dense": 1}
