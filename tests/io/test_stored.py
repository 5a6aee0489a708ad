"""What a file holds is the smallest form, whatever serves it; what serves is chosen at load."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer as gs
from gossamer.core.errors import FormatError
from gossamer.io import fill
from gossamer.io.digests import digest_of_content
from gossamer.io.manifest import read_manifest
from gossamer.io.stored import Stored, pack, unpack
from gossamer.nn import BitmapLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.floats(0, 0.8), st.integers(0, 99),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_tensor_round_trips_or_stays_as_it_is(shape, density, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    tensor = (tensor * (torch.rand(shape, generator=generator) < density)).to(dtype)
    parts = pack(tensor)
    if parts is None:
        bitmap = (tensor.numel() + 7) // 8
        assert int((tensor != 0).sum()) * tensor.element_size() + bitmap >= 0.95 * tensor.nbytes
        return
    facts = Stored(tuple(shape), str(dtype)[6:], parts[0].numel(), False)
    assert torch.equal(unpack("x", facts, *parts), tensor)
    assert sum(part.nbytes for part in parts) < 0.95 * tensor.nbytes


def test_what_counts_as_a_zero():
    tensor = torch.zeros(8, 8)
    tensor[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    values, bitmap = pack(tensor)
    again = unpack("x", Stored((8, 8), "float32", 3, False), values, bitmap)
    assert again[0, 0].isnan() and again[0, 1].isinf() and again[0, 3] == 1e-45
    assert not again[0, 2].signbit()  # -0.0 is read back as 0.0
    assert pack(torch.zeros(8, 8, dtype=torch.int64)) is None and pack(torch.zeros(64)) is None


class Zoo(nn.Module):
    """Weights of every kind that no kernel serves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.attention = nn.MultiheadAttention(16, 2)
        self.rnn = nn.LSTM(16, 16)
        self.conv = nn.Conv1d(16, 16, 3)
        self.halved = nn.Linear(16, 16).half()
        self.doubled = nn.Linear(16, 16).double()
        self.embedding = nn.Embedding(32, 16)
        self.tied = nn.Linear(16, 32, bias=False)
        self.tied.weight = self.embedding.weight
        self.turned = nn.Linear(16, 24)
        self.turned.weight = nn.Parameter(torch.randn(16, 24).t())
        self.register_buffer("table", torch.randn(16, 16))
        self.small = nn.Linear(2, 2)


def zoo():
    net = Zoo()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.dim() > 1:
                tensor.mul_(torch.rand(tensor.shape) < 0.3)
    return net


def test_every_kind_of_weight_is_stored_by_its_zeros(tmp_path):
    net = zoo()
    gs.save(net, tmp_path / "out")
    stored = read_manifest(tmp_path / "out")["stored"]
    assert {name.partition(".")[0] for name in stored} >= {
        "experts", "attention", "rnn", "conv", "halved", "doubled", "embedding", "turned", "table",
    }  # fmt: skip
    assert not any(facts.served for facts in stored.values())
    size = (tmp_path / "out/gossamer.safetensors").stat().st_size
    assert size < 0.6 * sum(p.nbytes for p in net.state_dict().values())
    again = gs.load(tmp_path / "out", model=Zoo())
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.tied.weight is again.embedding.weight
    assert isinstance(again.halved, nn.Linear) and again.halved.weight.requires_grad


def test_a_dense_model_is_an_ordinary_file(tmp_path):
    gs.save(nn.Sequential(nn.Linear(8, 8)), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()
    assert read_manifest(tmp_path / "out")["stored"] == {}


class LatencyModel:
    """Stands for measured latencies, of which only `slow` decides here."""

    def __init__(self, slow):
        self.slow = slow


@pytest.fixture
def judged(monkeypatch):
    """Layers named slow are faster dense, whatever their costs."""

    def why_dense(layer, latency, batches, calls=True):
        return (
            "no kernel wins: dense 1 ms" if latency and layer.out_features in latency.slow else None
        )

    monkeypatch.setattr(fill, "why_dense", why_dense)
    module = sys.modules["gossamer.io.load"]
    monkeypatch.setattr(module, "known_latency", lambda latency: latency)
    for name in ("use_latency", "choose_forms", "prepare_where_it_pays"):
        monkeypatch.setattr(module, name, lambda *_: None)


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48)).eval()


def test_what_serves_is_chosen_where_it_is_loaded(judged, tmp_path):
    net = gs.prune(two(), gs.weights.Magnitude(), density=0.3).model
    x = torch.randn(5, 64)
    expected = net(x)
    gs.save(gs.compress(net, latency="rule"), tmp_path / "packed")
    size = (tmp_path / "packed/gossamer.safetensors").stat().st_size

    here = gs.load(tmp_path / "packed", model=two(), latency=LatencyModel([48]))
    assert isinstance(here[0], BitmapLinear) and type(here[2]) is nn.Linear
    assert here[2].dense_reason == "no kernel wins: dense 1 ms"
    torch.testing.assert_close(here(x), expected)

    gs.save(here, tmp_path / "again")  # as small, though half of it is dense in memory
    manifest = read_manifest(tmp_path / "again")
    assert manifest["stored"]["2.weight"].served
    assert manifest["decisions"]["2"].reason == "no kernel wins: dense 1 ms"
    assert (tmp_path / "again/gossamer.safetensors").stat().st_size < 1.1 * size

    there = gs.load(tmp_path / "again", model=two(), latency=LatencyModel([]))
    assert isinstance(there[0], BitmapLinear) and isinstance(there[2], BitmapLinear)
    torch.testing.assert_close(there(x), expected)
    both = gs.load(tmp_path / "again", model=two(), latency=LatencyModel([32, 48]))
    assert type(both[0]) is type(both[2]) is nn.Linear
    assert torch.equal(both[0].weight, net[0].to_matrix()) and both[2].bias is not None


def test_layers_that_were_left_dense_for_another_reason_stay_so(judged, tmp_path):
    """And so does a model that was only pruned: it is to be trained on."""
    net = gs.prune(two(), gs.weights.Magnitude(), density=0.3)
    gs.save(net, tmp_path / "out")
    again = gs.load(tmp_path / "out", model=two(), latency=LatencyModel([]))
    assert type(again[0]) is type(again[2]) is nn.Linear and again[0].weight.requires_grad


def test_a_convs_transposed_layer_round_trips_dense_and_packed(judged, tmp_path):
    tf = pytest.importorskip("transformers")
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = tf.GPT2LMHeadModel(config).eval()
    gs.prune(model, gs.weights.Magnitude(), density=0.3)
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    gs.save(gs.compress(model, latency="rule"), tmp_path / "a")
    dense = gs.load(tmp_path / "a", latency=LatencyModel([32, 96, 128]))
    assert not any(isinstance(m, BitmapLinear) for m in dense.modules())
    torch.testing.assert_close(dense(ids).logits, expected)
    gs.save(dense, tmp_path / "b")
    packed = gs.load(tmp_path / "b", latency=LatencyModel([]))
    assert any(isinstance(m, BitmapLinear) for m in packed.modules())
    torch.testing.assert_close(packed(ids).logits, expected)


HOSTILE = [
    {"shape": [1 << 40, 1 << 40]}, {"shape": [1 << 23, 1 << 24]}, {"shape": [-1, 16]},
    {"shape": [256]}, {"shape": [True, 256]}, {"shape": [16, 16, 3]}, {"shape": [4, 64]},
    {"shape": [0, 3]}, {"shape": "16x16"}, {"shape": [1] * 9}, {"nnz": 5}, {"nnz": -1},
    {"nnz": 1 << 50}, {"nnz": True}, {"dtype": "float64"}, {"dtype": "int8"}, {"dtype": ["x"]},
    {"served": 1}, {"extra": 0}, {"served": True, "dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_entries_get_one_clear_error_and_no_memory(change, tmp_path):
    resource = pytest.importorskip("resource")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16))
    net[0].weight.data *= torch.rand(16, 16) < 0.3
    gs.save(net, tmp_path / "out")
    path = tmp_path / "out/gossamer.json"
    data = json.loads(path.read_text())
    data["stored"]["0.weight"].update(change)
    data["digest"] = digest_of_content(data)
    path.write_text(json.dumps(data))
    empty = nn.Sequential(nn.Linear(16, 16))
    before = empty[0].weight.detach().clone()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError) as caught:
        gs.load(tmp_path / "out", model=empty)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 50_000
    assert torch.equal(empty[0].weight, before)


def test_a_stored_entry_cannot_name_a_packed_layers_parts(tmp_path):
    net = gs.prune(two(), gs.weights.Magnitude(), density=0.3)
    gs.save(gs.compress(net, latency="rule"), tmp_path / "out")
    path = tmp_path / "out/gossamer.json"
    data = json.loads(path.read_text())
    data["stored"] = {"0.weight": {"shape": [32, 64], "dtype": "float32", "nnz": 1,
                                   "served": False}}  # fmt: skip
    data["digest"] = digest_of_content(data)
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"0\.weight"):
        gs.load(tmp_path / "out", model=two())
