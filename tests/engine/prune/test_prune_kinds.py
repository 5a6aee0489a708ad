"""What users bring beyond plain layers: pruned rightly, or left dense with a reason, or refused."""

import copy
import logging

import pytest
import torch
from examples import PRUNERS
from torch import nn

from gossamer.core.errors import UsageError
from gossamer.core.pattern import NM, Unstructured
from gossamer.engine.prune import run as prune_module
from gossamer.engine.prune.run import prune
from gossamer.engine.serve.compress import compress
from gossamer.models import choose_weights

Magnitude, Random, Wanda, SparseGPT = (
    PRUNERS[name] for name in ("magnitude", "random", "wanda", "sparsegpt")
)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


X = [torch.randn(24, 16, generator=torch.Generator().manual_seed(1))]


def reasons(result):
    return {each.name: each.reason for each in result.coverage.left_out}


class Experts(nn.Module):
    """Three experts; the last one is never chosen."""

    def __init__(self, transposed):
        super().__init__()
        shapes = ((3, 8, 24), (3, 12, 8)) if transposed else ((3, 24, 8), (3, 8, 12))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(s)) for s in shapes)
        self.transposed = transposed

    def one(self, x, index):
        up, down = self.gate_up_proj[index], self.down_proj[index]
        up, down = (up.t(), down.t()) if self.transposed else (up, down)
        gate, value = nn.functional.linear(x, up).chunk(2, -1)
        inner = nn.functional.silu(gate) * value
        return inner, nn.functional.linear(inner, down)

    def forward(self, x, chosen):
        out = torch.zeros_like(x)
        for index in range(2):
            out[chosen == index] = self.one(x[chosen == index], index)[1]
        return out


class Mixture(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.front, self.experts = nn.Linear(8, 8), Experts(transposed)

    def forward(self, x):
        return self.experts(x, (x[:, 0] > 0).long())


TOKENS = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_the_statistics_of_its_own_tokens(transposed):
    """Against Wanda by hand, from the definition, without any of the observers.

    What leads out of the experts is calibrated behind what leads in, already pruned.
    """
    model = Mixture(transposed)
    dense = copy.deepcopy(model)
    result = prune(model, Wanda(), density=0.5, data=[TOKENS[:40], TOKENS[40:]])
    chosen = (TOKENS[:, 0] > 0).long()
    for index in range(2):
        x = TOKENS[chosen == index]
        inputs = {"gate_up_proj": x, "down_proj": model.experts.one(x, index)[0].detach()}
        for name, rows in inputs.items():
            stored = getattr(dense.experts, name)[index].detach()
            matrix = stored.t() if transposed else stored
            scores = matrix.abs() * rows.norm(dim=0)
            kept = scores >= scores.topk(scores.shape[1] // 2, dim=1).values[:, -1:]
            support = result.supports[f"experts.{name}.{index}"]
            assert torch.equal(support.mask, kept)
            now = getattr(model.experts, name)[index].detach()
            assert torch.equal(now.t() if transposed else now, matrix * kept)
    unreached = "its product was not seen in calibration"
    assert reasons(result) == {
        "front.weight": "the calibration data never reached it",
        "experts.gate_up_proj.2": unreached, "experts.down_proj.2": unreached,
    }  # fmt: skip
    assert torch.equal(model.experts.down_proj[2], dense.experts.down_proj[2])
    assert torch.equal(model.front.weight, dense.front.weight)


def test_mixtral_has_norms_of_the_tokens_that_its_router_sends():
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = t.MixtralForCausalLM(t.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )).eval()  # fmt: skip
    dense, ids = copy.deepcopy(model), torch.randint(0, 64, (2, 30))
    seen = []
    handle = dense.model.layers[0].mlp.experts.register_forward_hook(
        lambda module, args, output: seen.append(args)
    )
    with torch.no_grad():
        dense(ids)
    handle.remove()
    # All of the block is calibrated before any of it is pruned, so the dense inputs count.
    hidden, chosen = seen[0][0], seen[0][1]
    result = prune(model, Wanda(), density=0.5, data=[{"input_ids": ids}])
    for index in range(4):
        rows = hidden[(chosen == index).any(dim=1)]
        matrix = dense.model.layers[0].mlp.experts.gate_up_proj[index].detach()
        scores = matrix.abs() * rows.norm(dim=0)
        kept = scores >= scores.topk(16, dim=1).values[:, -1:]
        name = f"model.layers.0.mlp.experts.gate_up_proj.{index}"
        assert (result.supports[name].mask == kept).float().mean() > 0.999
    assert "model.layers.0.mlp.gate.weight" in reasons(result)


def test_experts_that_lie_unexpectedly_are_seen_and_turned():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.w1 = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return torch.bmm(x, self.experts.w1)

    model, x = Square(), torch.randn(2, 20, 8)
    before = model.experts.w1.detach().clone()
    result = prune(model, Wanda(), density=0.5, data=[x])
    scores = before[1].t().abs() * x[1].norm(dim=0)
    kept = scores >= scores.topk(4, dim=1).values[:, -1:]
    assert torch.equal(result.supports["experts.w1.1"].mask, kept)


def convolutions():
    return nn.Sequential(
        nn.Conv1d(4, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 8, 4, stride=2),
        nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular"),
    )


NETS = {
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
    "recurrent": (lambda: nn.Sequential(nn.GRU(16, 8, 2, bidirectional=True)), (5, 2, 16)),
    "cell": (lambda: nn.Sequential(nn.RNNCell(16, 8)), (5, 16)),
    "convolutions": (convolutions, (2, 4, 12)),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.ConvTranspose3d(4, 2, 2)),
        (2, 2, 3, 4, 5),
    ),
}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", [Magnitude, Random, Wanda, SparseGPT])
def test_every_matrix_of_a_kind_is_pruned_to_what_is_told(kind, method):
    torch.manual_seed(0)
    make, shape = NETS[kind]
    model, x = make().eval(), torch.randn(shape)
    for pattern, density in ((None, 0.5), (NM(2, 4), None)):
        pruned = copy.deepcopy(model)
        result = prune(pruned, method(), pattern=pattern, density=density, data=[x])
        left = [each.reason for each in result.coverage.left_out]
        assert not left or (pattern and all("2:4 does not fit" in reason for reason in left))
        weights = choose_weights(pruned).weights
        for record in result.layers:
            matrix = weights[record.name].matrix()
            assert record.density == float((matrix != 0).float().mean())
            assert not bool((matrix * ~result.supports[record.name].mask).any())
            if pattern:
                groups = result.supports[record.name].mask.reshape(-1, 4)
                assert bool((groups.sum(1) == 2).all())
        if (kind, method) != ("cell", SparseGPT):  # its state is all zeros, which SparseGPT drops
            assert abs(result.measured_density - 0.5) < 0.02
        assert bool(torch.isfinite(torch.as_tensor(_first(pruned(x)))).all())


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def test_grouped_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    x = torch.randn(2, 4, 9, 9)
    assert len(prune(copy.deepcopy(model), Magnitude(), density=0.5).supports) == 2
    result = prune(copy.deepcopy(model), Wanda(), density=0.5, data=[x])
    assert list(result.supports) == ["0"] and "inputs of its own" in reasons(result)["1.weight"]
    with pytest.raises(UsageError, match="1: each group"):
        prune(model, Wanda(), density=0.5, data=[x], include=("1",))


def test_layers_that_the_data_never_reaches():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model = Two()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="never reached idle"):
        prune(model, Wanda(), density=0.5, data=X, uncalled="error")
    with pytest.raises(UsageError, match="never reached idle"):
        prune(model, Wanda(), density=0.5, data=X, exclude=("used",))
    with pytest.raises(UsageError, match="'dense' or 'error'"):
        prune(model, Wanda(), density=0.5, data=X, uncalled="skip")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    result = prune(model, Wanda(), density=0.5, data=X)
    assert list(result.supports) == ["used"] and result.measured_density == 0.5
    assert reasons(result) == {"idle.weight": "the calibration data never reached it"}
    assert torch.equal(model.idle.weight, before["idle.weight"])
    assert len(prune(model, Magnitude(), density=0.5).supports) == 2


class Switch(nn.Module):
    """Sends nothing to `late` once `first` is pruned."""

    def __init__(self):
        super().__init__()
        self.first, self.late, self.last = (nn.Linear(16, 16, bias=False) for _ in range(3))
        nn.init.ones_(self.first.weight)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.late(y) if bool((self.first.weight != 0).all()) else y)


def test_a_layer_that_is_no_longer_reached_stays_dense(tmp_path):
    for resumed in (0, 3):
        torch.manual_seed(0)
        model = Switch()
        result = prune(model, Wanda(), density=0.5, data=X, journal=tmp_path / "journal")
        assert result.provenance["resumed_units"] == resumed
        assert list(result.supports) == ["first", "last"]
        assert "no longer reached" in reasons(result)["late.weight"]
        assert bool((model.late.weight != 0).all())


def test_coverage_counts_the_model_as_it_is():
    model = nn.Sequential(nn.Embedding(6, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    model.classifier = nn.Linear(16, 4)
    with torch.no_grad():
        model[1].weight[0] = 0
    result = prune(model, Magnitude(), density=0.5)
    cover = result.coverage
    assert cover.total == 96 + 272 + 32 + 68 and cover.matrices == cover.prunable == 96 + 256 + 64
    assert cover.pruned == 256 and cover.pruned_share == 256 / 416
    assert cover.nonzero == sum(int((p != 0).sum()) for p in model.parameters())
    assert {x.name: (x.kind, x.count) for x in cover.left_out} == {
        "0.weight": ("Embedding", 96), "classifier.weight": ("Linear", 64),
    }  # fmt: skip


def test_densities_count_weights_that_are_zero_though_kept():
    model = mlp()
    with torch.no_grad():
        model[0].bias[:8] = -100.0  # dead inputs of the next layer, whose weights are set to zero
    result = prune(model, SparseGPT(), density=0.75, data=X)
    assert result.supports["2"].density == 0.75
    real = float((model[2].weight != 0).float().mean())
    assert result.layers[1].density == real < 0.6
    assert result.measured_density == (real + 0.75) / 2
    again = prune(model, Magnitude(), density=0.9)
    assert again.measured_density == (real + 0.75) / 2


@pytest.mark.parametrize("pattern", [None, Unstructured("row"), NM(2, 4)])
@pytest.mark.parametrize("method", [Magnitude, Random, Wanda, SparseGPT])
def test_zeros_stay_where_that_is_wanted(method, pattern):
    model = mlp()
    prune(model, Magnitude(), density=0.4)
    zero = model[0].weight == 0
    density = None if isinstance(pattern, NM) else 0.3
    result = prune(model, method(), pattern=pattern, density=density, data=X, keep_zeros=True)
    assert bool((model[0].weight[zero] == 0).all())
    assert not bool((result.supports["0"].mask & zero).any())
    if density and method is not SparseGPT:  # there were enough others to choose from
        counts = result.supports["0"].mask.sum()
        assert abs(int(counts) - round(0.3 * 256)) <= (16 if pattern or method is Wanda else 0)


def test_weights_that_share_memory_are_left_out_or_found_out():
    model = mlp()
    model[2].weight = nn.Parameter(model[0].weight.detach()[4:12])
    result = prune(nn.Sequential(model, nn.Linear(8, 8)), Magnitude(), density=0.5)
    assert list(result.supports) == ["1"]
    assert "tied" in reasons(result)["0.0.weight"] and "tied" in reasons(result)["0.2.weight"]


def test_what_is_written_elsewhere_afterwards_is_found_out(monkeypatch):
    model = mlp()
    solve = prune_module._solve

    def meddling(plan, name, weight, stats):
        if name == "2":
            model[0].weight.data.fill_(1.0)
        return solve(plan, name, weight, stats)

    monkeypatch.setattr(prune_module, "_solve", meddling)
    with pytest.raises(UsageError, match="0: is not zero where it was pruned"):
        prune(model, Magnitude(), density=0.5)


def refused():
    meta = mlp().to("meta")
    half = mlp()
    half[2].weight = nn.Parameter(half[2].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(8))
    integer = mlp()
    integer[0].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    expanded = mlp()
    expanded[2].weight = nn.Parameter(torch.randn(1, 16).expand(16, 16))
    packed = mlp()
    prune(packed, Magnitude(), density=0.2)
    compress(packed, latency="rule")
    lstm = nn.Sequential(nn.LSTM(4, 4))
    nn.utils.parametrizations.weight_norm(lstm[0], "weight_hh_l0")
    return {
        "meta": (meta, r"0: is on the meta device"),
        "float8": (half, r"2: its weight is torch.float8"),
        "lazy": (lazy, r"1: is not initialised"),
        "int8": (integer, r"0: its weight is torch.int8"),
        "expanded": (expanded, r"2: its weight is expanded"),
        "packed": (packed, r"compressed already"),
        "recomputed": (lstm, r"0.weight_hh_l0: .*remove_parametrizations"),
    }


@pytest.mark.parametrize(
    "kind", ["meta", "float8", "lazy", "int8", "expanded", "packed", "recomputed"]
)
def test_what_cannot_be_pruned_is_refused_by_name(kind):
    model, message = refused()[kind]
    with pytest.raises(UsageError, match=message) as caught:
        prune(model, Magnitude(), density=0.5)
    assert "\n" not in str(caught.value)


def test_a_forward_of_its_own():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(16, 16), nn.Linear(16, 16))
    before = model[0].weight.detach().clone()
    result = prune(model, Magnitude(), density=0.5)
    assert torch.equal(model[0].weight, before)
    assert "forward of its own" in reasons(result)["0.weight"]
    with pytest.raises(UsageError, match="0: Doubled has a forward of its own"):
        prune(model, Wanda(), density=0.5, data=X, include=("0",))
    result = prune(model, Magnitude(), density=0.5, include=("0",))
    assert float((model[0].weight != 0).float().mean()) == 0.5
    assert any("0: the stored weight was pruned" in note for note in result.notes)


def test_users_hooks_are_measured_not_guessed():
    model, twin = mlp(), mlp()
    scale = torch.linspace(0.01, 5, 16)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    hooked = prune(model, Wanda(), density=0.5, data=X).supports["0"].mask
    scaled = prune(twin, Wanda(), density=0.5, data=[X[0] * scale]).supports["0"].mask
    assert torch.equal(hooked, scaled)
    assert not torch.equal(hooked, prune(mlp(), Wanda(), density=0.5, data=X).supports["0"].mask)


def test_a_model_that_works_in_place_sees_the_same_data_in_every_pass():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Linear(16, 16))
    data = [X[0].clone()]
    prune(model, Wanda(), density=0.5, data=data)
    assert torch.equal(data[0], X[0])


def test_compiled_and_parallel_models():
    plain = prune(mlp(), Wanda(), density=0.5, data=X)
    compiled = mlp()
    compiled.compile(backend="eager")
    for model in (compiled, torch.compile(mlp(), backend="eager"), nn.DataParallel(mlp())):
        result = prune(model, Wanda(), density=0.5, data=X)
        assert {n: s.mask.sum() for n, s in result.supports.items()} == {
            n: s.mask.sum() for n, s in plain.supports.items()
        }


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([mlp(), mlp()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_hessians_of_a_block_are_gathered_in_turns(monkeypatch):
    whole = prune(Stack(), SparseGPT(), density=0.5, data=X).supports
    monkeypatch.setattr(prune_module, "HESSIANS", 1)
    parts = prune(Stack(), SparseGPT(), density=0.5, data=X).supports
    assert all(torch.equal(support.mask, parts[name].mask) for name, support in whole.items())


def test_the_result_is_short_and_says_what_was_left(caplog):
    model = nn.Sequential(mlp(), nn.Embedding(50, 16))
    model.classifier = nn.Linear(16, 4)
    model.mystery = nn.Parameter(torch.randn(30, 30))
    with caplog.at_level(logging.WARNING, "gossamer"):
        result = prune(model, Magnitude(), density=0.5)
    text = str(result)
    assert text == repr(result) and len(text.splitlines()) <= 8 and "tensor(" not in text
    for words in ("magnitude, unstructured", "0.5000 of 2", "an output head", "mystery"):
        assert words in text
    page = result._repr_html_()
    assert page.startswith("<table>") and "an output head" in page and "tensor(" not in page
    assert len(caplog.records) == 1 and "mystery" in caplog.text
    caplog.clear()
    prune(mlp(), Magnitude(), density=0.5)
    assert not caplog.records


def test_a_mask_that_says_nothing_about_tokens_is_noted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(16, 16)

        def forward(self, x, attention_mask):
            return self.f(x)

    batch = {"x": X[0][None], "attention_mask": torch.ones(1, 1, 24, 24)}
    result = prune(Net(), Wanda(), density=0.5, data=[batch])
    assert result.notes == ("padding was counted where attention_mask is not (batch, tokens)",)
