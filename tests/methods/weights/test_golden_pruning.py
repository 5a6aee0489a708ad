"""Wanda, SparseGPT, OWL and the allocations against the authors' released code."""

import golden
import numpy as np
import pytest
import torch

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.core.select import select
from gossamer.core.stats import ColumnNorm, Hessian
from gossamer.methods.weights.topology import layer_counts

COLUMNS = np.arange(256)


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight_and_inputs():
    """The layer that Wanda's, SparseGPT's and OWL's records share: (16, 256) and 128 inputs."""
    x = np.random.default_rng(102).standard_normal((4, 32, 256)) * (1 + COLUMNS % 8)
    x = (x + (((7 * COLUMNS) % 11) - 5) / 8).astype(np.float32)
    return torch.tensor(normal(101, (16, 256))), torch.tensor(x).reshape(128, 256)


def stats_of(kind, x):
    state = kind.init(x.shape[1])
    for part in x.split(32):
        state = kind.update(state, part)
    return kind.finalize(state, "layer")


def test_wanda_scores_and_masks():
    want = golden.load("wanda")["expected"]
    weight, x = weight_and_inputs()
    stats = stats_of(ColumnNorm(), x)
    golden.close(stats.norm.square() / 4, want["scaler_row"])  # per sequence, of which there are 4
    method = gs.weights.Wanda()
    scores = method.score(weight, stats)
    golden.close(scores[0, :8] / 2, want["score_row0_first8"])
    # int(256 * 0.7) = 179 go in each row, which leaves the nearest whole number to 256 * 0.3
    for name, pattern, density in (
        ("unstructured_50", method.default_pattern, 0.5),
        ("unstructured_70", method.default_pattern, 0.3),
        ("2:4", gs.NM(2, 4), 0.5),
        ("4:8", gs.NM(4, 8), 0.5),
    ):
        mask = select(scores, pattern, density).mask
        assert golden.is_mask(mask, want[f"kept_mask_{name}"]), name


# The release removes one weight more than int(n * sparsity) of each block of 128 columns, because
# it removes what equals the threshold too: 1023 and 614 of 2048 stay.
@pytest.mark.parametrize(
    ("name", "pattern", "density"),
    [
        ("unstructured_50", gs.Unstructured(), 1023 / 2048),
        ("unstructured_70", gs.Unstructured(), 614 / 2048),
        ("2:4", gs.NM(2, 4), 0.5),
        ("4:8", gs.NM(4, 8), 0.5),
    ],
)
def test_sparsegpt_masks_and_repaired_weights(name, pattern, density):
    want = golden.load("sparsegpt")["expected"]
    weight, x = weight_and_inputs()
    stats = stats_of(Hessian(torch.float64), x)
    golden.close(stats.hessian.diagonal()[:12] * 128 / 4, want["H_diag_first12"])
    new, support = gs.weights.SparseGPT().solve(weight, stats, pattern, density)
    assert golden.is_mask(support.mask, want[f"kept_mask_{name}"])
    golden.close(new[0, :16], want[f"row0_first16_{name}"])
    golden.close(new, want[f"weights_{name}"])
    before = x.double() @ weight.double().t()
    error = (before - x.double() @ new.double().t()).square().sum() / before.square().sum()
    assert float(error) == pytest.approx(want[f"relative_output_error_{name}"], rel=1e-3)


@pytest.mark.parametrize(("sparsity", "lam", "m"), [(0.7, 0.08, 5), (0.5, 0.04, 3)])
def test_owl_outliers_and_densities(sparsity, lam, m):
    want = golden.load("owl")["expected"]
    norm = stats_of(ColumnNorm(), weight_and_inputs()[1]).norm
    layers = []
    for block in range(5):
        wide = 1 + 2 * block * (COLUMNS % (3 + block) == 0)
        for i, weight in enumerate(
            (normal(110 + 2 * block, (24, 256)) * wide, normal(111 + 2 * block, (12, 256)))
        ):
            weight = torch.tensor(weight.astype(np.float32))
            layers.append(LayerInfo(f"{block}.{i}", (24, 256), block, weight, norm))
    case = f"S{sparsity}_lambda{lam}_m{m}"
    owl = gs.OWL(m=m, lam=lam)
    shares = [100 * owl.outlier_share(layers[2 * b : 2 * b + 2]) for b in range(5)]
    assert shares == pytest.approx(want[f"{case}_outlier_percent"]["values"], rel=1e-4)
    found = owl.allocate(layers, 1 - sparsity)
    assert [found[f"{b}.0"] for b in range(5)] == pytest.approx(
        want[f"{case}_density"]["values"], rel=1e-4
    )
    # int(256 * (1 - density)) go in each row of the release; rounding to the nearest keeps at most
    # one fewer
    for block, removed in enumerate(want[f"{case}_removed_per_row"]["values"]):
        assert 256 - round(256 * found[f"{block}.0"]) - removed[0] in (0, 1)


def infos(net):
    return [
        LayerInfo(x["name"], tuple(x["shape"]), None, torch.empty(x["shape"], device="meta"))
        for x in net
    ]


ALLOCATIONS = {"ERK": gs.ERK(), "ER": gs.ER(), "uniform": gs.Uniform()}


def test_erk_er_and_uniform_densities():
    record = golden.load("erk_er_uniform")
    cases = [x for x in record["cases"] if x["allocation"] in ALLOCATIONS]
    assert len(cases) >= 36
    for case in cases:
        layers = infos(record["inputs"]["nets"][case["net"]])
        allocation = ALLOCATIONS[case["allocation"]]
        if "layer_density" not in case:
            continue
        found = allocation.allocate(layers, case["density"])
        assert found == pytest.approx(case["layer_density"], rel=1e-6), case
        # The release draws each weight by itself; our counts are the expected ones, rounded.
        counts = layer_counts(layers, allocation, case["density"])
        for name, expected in case.get("expected_kept", {}).items():
            assert abs(counts[name] - expected) < 1 + 1e-4 * expected


def test_uniform_plus_has_the_release_s_floors_but_meets_the_budget():
    """The release shares what is left among all weights, fixed layers included, and so falls short
    of its budget, down to a negative density; here the rest is solved for exactly."""
    record = golden.load("erk_er_uniform")
    cases = [x for x in record["cases"] if x["allocation"] == "uniform+"]
    assert len(cases) == 8
    for case in cases:
        layers = infos(record["inputs"]["nets"][case["net"]])
        density = case["density_requested"]
        if case["density_used_for_middle_layers"] < 0:
            with pytest.raises(gs.UsageError, match="too low"):
                gs.UniformPlus().allocate(layers, density)
            continue
        found = gs.UniformPlus().allocate(layers, density)
        total = sum(x.size for x in layers)
        assert sum(found[x.name] * x.size for x in layers) == pytest.approx(density * total)
        first, *middle, last = layers
        assert found[first.name] == 1.0 and first.name not in case["masked_layers"]
        assert len({found[x.name] for x in middle}) == 1
        if density < 0.2:
            assert found[last.name] == case["last_layer_density"] == 0.2
            budget = density * total - first.size - 0.2 * last.size
            assert case["density_used_for_middle_layers"] == pytest.approx(budget / total)
            assert found[middle[0].name] == pytest.approx(budget / sum(x.size for x in middle))


def test_the_original_repository_s_erk_up_to_its_whole_zeros():
    """It rounds the zeros of each layer down, so its budget is up to a weight per layer larger."""
    record = golden.load("rigl_step")
    cases = [x for x in record["cases"] if x["case"] in ("ERK", "ER")]
    assert len(cases) == 16
    for case in cases:
        net = [
            {"name": name, "shape": [*shape[::-1][:2], *shape[:-2]]}
            for name, shape in record["inputs"]["nets_for_ERK"][case["net"]]
        ]
        found = ALLOCATIONS[case["case"]].allocate(infos(net), 1 - case["sparsity"])
        assert found == pytest.approx(case["layer_density"], rel=2e-3), case
