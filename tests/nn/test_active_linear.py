"""Layers that choose their inputs, packed: one copy of the weight, every format, saved and loaded."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.engine.measure.evaluate import bits_per_byte
from gossamer.io.manifest import read_manifest
from gossamer.nn import ActiveLinear
from gossamer.nn.packed.active import columns_of

METHODS = {
    "teal": "teal:allocation=uniform",
    "wina": "wina:density=0.4,rotate=all",
    "wina-plain": "wina:density=0.4,rotate=off",
    "rsparse": "rsparse:share=0.5",
}


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (4, 48), generator=generator) for _ in range(2)]


def packed(model, method="teal:allocation=uniform", **options):
    plan = gs.calibrate_activations(model, method, prompts())
    return gs.compress(model, activations=plan, latency="rule", **options), plan


def active_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ActiveLinear)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_packed_is_the_block_s_model(name, tiny_llama):
    model, ids = tiny_llama(), prompts()[0][:1, :20]
    plan = gs.calibrate_activations(model, METHODS[name], prompts())
    with gs.sparsify_activations(model, plan, break_even=float("inf")) as run:
        want = gs.generate(model, ids, 8, eos=())
    fast = gs.compress(model, activations=plan, latency="rule")
    assert torch.equal(gs.generate(fast, ids, 8, eos=()), want)
    layers = active_layers(fast.model)
    assert layers.keys() == run.products.keys()
    for key, layer in layers.items():
        assert layer.active.counts == run.products[key].counts
    records = {record.name: record for record in fast.layers}
    assert all(records[key].kernel.startswith("active-neurons/") for key in layers)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9, 64])
def test_every_format_is_its_dequantised_product(bits, dtype, density, tokens):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40).to(dtype)
    columns = columns_of(layer.weight, bits)
    state = gs.activations.TEAL(density).prepare(layer.weight, None, density)
    made = ActiveLinear(columns, state, gs.Fraction(density), layer.bias, dtype=dtype)
    x = torch.randn(tokens, 96, dtype=dtype)
    kept = x.masked_fill(~made.active.mask(x), 0) if tokens <= 8 else x
    with torch.no_grad():
        found = made(x)
        want = nn.functional.linear(kept.float(), columns.to_float().t(), layer.bias.float())
    assert found.dtype == dtype
    loose = 0.03 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.float(), want, rtol=loose, atol=loose)
    torch.testing.assert_close(made.weight + 0, layer.weight, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_weights_are_not_read(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40).to(dtype)
    state = gs.activations.TEAL(0.3).prepare(layer.weight, None, 0.3)
    made = ActiveLinear(columns_of(layer.weight), state, gs.Fraction(0.3), layer.bias)
    x = torch.randn(1, 96, dtype=dtype)
    with torch.no_grad():
        want = made(x)
        made.values[~made.active.mask(x)[0]] = float("nan")
        assert torch.equal(made(x), want)
        made.values[made.active.mask(x)[0]] = float("nan")
        assert made(x).isnan().all()
    assert made.active.counts.kept == 3 * 29 == made.active.counts.union


def test_integers_are_scaled_where_that_is_nearer():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    inputs, outputs = torch.ones(64), torch.ones(64, 1)
    inputs[3], outputs[3] = 40, 40
    assert columns_of(weight * inputs, 8).scale.shape == (64, 1)
    assert columns_of(weight * outputs, 8).scale.shape == (1, 64)
    with pytest.raises(gs.UsageError, match="8 bits or none"):
        columns_of(weight, 4)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_save_and_load_give_the_same_tokens(name, bits, tiny_llama, tmp_path):
    ids = prompts()[0][:1, :20]
    fast, plan = packed(tiny_llama(), METHODS[name], bits=bits)
    want = gs.generate(fast, ids, 8, eos=())
    again = gs.load(gs.save(fast, tmp_path / "model"), latency="rule")
    assert torch.equal(gs.generate(again, ids, 8, eos=()), want)
    layers = active_layers(again)
    assert layers.keys() == active_layers(fast.model).keys()
    for key, layer in layers.items():
        assert layer.budget == plan.layers[key].budget and layer.by.startswith(name.split("-")[0])
    if name == "wina":
        first = layers["model.layers.0.mlp.gate_proj"].rotation
        assert first is layers["model.layers.0.mlp.up_proj"].rotation
        held = [key for key in again.state_dict() if key.endswith(".turns")]
        assert len(held) == len({id(x.rotation) for x in layers.values() if x.rotation})
    copied = copy.deepcopy(again)
    assert torch.equal(gs.generate(copied, ids, 8, eos=()), want)


def test_bfloat16_is_saved_bit_for_bit(tiny_llama, tmp_path):
    fast, _ = packed(tiny_llama().to(torch.bfloat16), "rsparse:share=0.5")
    again = gs.load(gs.save(fast, tmp_path / "model"), latency="rule").state_dict()
    want = fast.model.state_dict()
    assert want.keys() == again.keys()
    assert all(x.dtype == again[n].dtype and torch.equal(x, again[n]) for n, x in want.items())


def test_quality_is_that_of_decoding(tiny_llama):
    model, text = tiny_llama(), bytes(range(256)) * 2
    dense = bits_per_byte(model, text)
    plan = gs.calibrate_activations(model, "teal:density=0.1,allocation=uniform", prompts())
    with gs.sparsify_activations(model, plan, simulate=True, prefill="sparse"):
        want = bits_per_byte(model, text)
    fast = gs.compress(model, activations=plan, latency="rule")
    counts = [layer.active.counts for layer in active_layers(fast.model).values()]
    assert bits_per_byte(fast, text) == pytest.approx(want, rel=1e-4)
    assert abs(want - dense) > 1e-3
    assert [layer.active.counts for layer in active_layers(fast.model).values()] == counts
    assert not any(layer.active.prompts for layer in active_layers(fast.model).values())


def test_a_fresh_process_generates_the_same(tiny_llama, tmp_path):
    fast, _ = packed(tiny_llama(), "wina:density=0.4,rotate=all")
    folder = gs.save(fast, tmp_path / "model")
    want = gs.generate(fast, torch.tensor([[1, 2, 3]]), 8, eos=()).tolist()
    code = (
        "import sys, torch, gossamer as gs; m = gs.load(sys.argv[1], latency='rule');"
        "print(gs.generate(m, torch.tensor([[1, 2, 3]]), 8, eos=()).tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == want


def test_one_copy_of_the_weight(tiny_llama):
    model = tiny_llama()
    before = sum(t.nbytes for t in model.state_dict().values())
    fast, _ = packed(model)
    assert sum(t.nbytes for t in fast.model.state_dict().values()) == before
    small, _ = packed(tiny_llama(), bits=8)
    rest = sum(t.nbytes for n, t in tiny_llama().state_dict().items() if "_proj" not in n)
    assert sum(t.nbytes for t in small.model.state_dict().values()) - rest < 0.3 * before


def test_unpack_gives_the_weights_back(tiny_llama):
    model = tiny_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fast, _ = packed(model)
    again = gs.unpack(fast)
    found = again.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[key], before[key]) for key in before)


def test_a_cast_keeps_norms_exact(tiny_llama):
    fast, _ = packed(tiny_llama(), "wina:density=0.4,norms=all,rotate=all")
    fast.model.to(torch.bfloat16)
    for layer in active_layers(fast.model).values():
        assert layer.norms.dtype == torch.float32 and layer.values.dtype == torch.bfloat16
        assert layer.rotation is None or layer.rotation.matrix.dtype == torch.bfloat16
    assert gs.generate(fast, prompts()[0][:1], 3, eos=()).shape[1] == 51


def test_what_a_file_may_not_say(tiny_llama, tmp_path):
    fast, _ = packed(tiny_llama(), "wina:density=0.4,rotate=all")
    folder = gs.save(fast, tmp_path / "model")
    good = json.loads((folder / "gossamer.json").read_text())
    assert good["version"] == 3
    key = "model.layers.0.mlp.up_proj"
    told = good["layers"][key]["activations"]
    for changes in (
        {"kept": 0}, {"fraction": 2.0}, {"rank": -1}, {"turns": 3}, {"norms": 1}, {"more": 1},
        {"facts": {"share": "all"}}, {"turns": "lm_head"},
    ):  # fmt: skip
        bad = copy.deepcopy(good)
        bad["layers"][key]["activations"] = {**told, **changes}
        (folder / "gossamer.json").write_text(json.dumps(bad))
        with pytest.raises(gs.FormatError):
            gs.load(folder, latency="rule", verify=False)
    ordinary = gs.save(tiny_llama(), tmp_path / "ordinary")
    assert read_manifest(ordinary)["version"] == 2  # what older versions read


def test_thresholds_of_another_model_are_refused(tiny_llama):
    plan = gs.calibrate_activations(tiny_llama(), "teal:allocation=uniform", prompts())
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 2
    with pytest.raises(gs.UsageError, match="another model"):
        gs.compress(other, activations=plan)
    assert not active_layers(other)
    with pytest.raises(gs.UsageError, match="8 bits or none"):
        gs.compress(tiny_llama(), activations=plan, bits=4)


def test_a_packed_model_is_not_calibrated_again(tiny_llama):
    fast, _ = packed(tiny_llama())
    with pytest.raises(gs.UsageError, match="is packed"):
        gs.calibrate_activations(fast.model, "teal", prompts())


def test_excluded_layers_stay_dense(tiny_llama):
    fast, _ = packed(tiny_llama(), exclude=["*down_proj"])
    assert not any("down_proj" in name for name in active_layers(fast.model))
    assert len(active_layers(fast.model)) == 12
