"""Topology methods and soups against the authors' released code, most of them in the real loop."""

import math
from functools import partial
from itertools import pairwise

import golden
import pytest
import torch
from examples import step_of
from torch import nn

import gossamer as gs
from gossamer.core.allocation import LayerInfo
from gossamer.core.schedule import Cosine, Cubic
from gossamer.methods.weights.gmp import prune_globally
from gossamer.methods.weights.topology import drop_and_regrow, without_smallest
from gossamer.ops.select import select


def linear(weight):
    """A layer without bias of this weight (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def two_layers(record):
    """Weights, masks and dense gradients of the two layers of RigL's and GraNet's records."""
    inputs = record["inputs"]
    drawn = {part: {n: golden.draw(inputs, f"{n}.{part}") for n in "ab"}
             for part in ("raw_weight", "u", "dense_grad")}  # fmt: skip
    masks = {name: u < 0.5 for name, u in drawn["u"].items()}
    assert all(golden.is_mask(masks[n], inputs[f"{n}.mask0"]) for n in "ab")
    infos = [
        LayerInfo(name, tuple(x.shape), None, x * masks[name])
        for name, x in drawn["raw_weight"].items()
    ]
    return infos, masks, drawn["dense_grad"]


@pytest.mark.parametrize("case", range(3))
def test_rigl_update(case):
    record = golden.load("rigl_step")
    infos, masks, gradients = two_layers(record)
    want = record["cases"][case]
    # so early in so long a run that the cosine has not left its start
    method = gs.weights.RigL(0.5, every=1, drop=want["drop_fraction"])
    (new,) = method.update(step_of(1, 10**9, infos, masks, gradients))
    for x in infos:
        after, kept = want["after"][x.name], new[x.name]
        assert golden.is_mask(kept, after["mask"])
        # Theirs is the dense weight behind the mask: stale outside, zero where newly grown.
        values = torch.tensor(after["dense_weight"]["values"]) * kept
        torch.testing.assert_close(x.weight * kept, values, rtol=1e-4, atol=1e-6)


def test_rigl_drop_fraction():
    """Only the cosine from the first step on: a later start shifts theirs, and ours has none."""
    cases = [x for x in golden.load("rigl_step")["cases"] if x["case"] == "drop fraction"]
    (want,) = [x for x in cases if x["anneal"] == "cosine" and x["begin_step"] == 0]
    for step, value in want["step_value"]:
        assert Cosine(want["initial"])(step / want["end_step"]) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("case", range(3))
def test_granet_drop_and_regrow_in_the_loop(case):
    """Weights, masks and momentum after an update: a step that moves nothing, then ours."""
    record = golden.load("granet_step")
    infos, masks, gradients = two_layers(record)
    want = record["cases"][case]
    rate = want["rate"]
    model = nn.ModuleDict({x.name: linear(x.weight) for x in infos})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=1.0, dampening=1.0)
    method = gs.weights.GraNet(0.2, every=100, end=0.1, drop=rate, drop_end=rate)
    with gs.sparse_training(model, optimizer, method, total_steps=2000, include=("*",)) as run:
        state = run.state_dict()
        run.load_state_dict({**state, "step": 999, "masks": masks})
        for x in infos:
            layer = model[x.name]
            layer.weight.data.copy_(x.weight)
            layer.weight.grad = gradients[x.name].clone()
            momentum = golden.draw(record["inputs"], f"{x.name}.momentum_raw") * masks[x.name]
            optimizer.state[layer.weight]["momentum_buffer"] = momentum
        optimizer.step()
        for x in infos:
            after, weight = want["after"][f"{x.name}.weight"], model[x.name].weight
            assert int(masks[x.name].sum()) == want["active_before"][x.name]
            assert golden.is_mask(run.masks[x.name], after["mask"])
            golden.close(weight.detach(), after["weight"])
            golden.close(optimizer.state[weight]["momentum_buffer"], after["momentum"])


def test_granet_update_after_pruning():
    """Theirs keeps int(n * density) - 1 of all weights, ours the nearest whole number: the same
    ranking, one or two weights further. From their count on everything is the same."""
    record = golden.load("granet_step")
    cases = [x for x in record["cases"] if "global_sparsity_target" in x]
    assert len(cases) >= 3
    for want in cases:
        infos, masks, gradients = two_layers(record)
        n, density = sum(x.size for x in infos), 1 - want["global_sparsity_target"]
        count = want["keep_argument_int(n*(1-s))"] - 1
        theirs = prune_globally(infos, masks, count / n)
        for x in infos:
            assert golden.is_mask(
                theirs[x.name], want["mask_after_global_prune"][x.name + ".weight"]
            )
        ours = prune_globally(infos, masks, density)
        assert sum(int(m.sum()) for m in ours.values()) == math.floor(n * density + 0.5)
        assert all((ours[name] | ~theirs[name]).all() for name in theirs)
        rate = want["parameters"]["drop_rate"]
        stay = partial(without_smallest, fraction=rate, rounded=math.ceil)
        grown = drop_and_regrow(infos, gradients, theirs, stay)
        for x in infos:
            after = want["after"][x.name + ".weight"]
            assert golden.is_mask(grown[x.name], after["mask"])
            golden.close(x.weight * theirs[x.name] * grown[x.name], after["weight"])


def test_granet_schedules():
    """The same at every step of theirs; at the end of the ramp, where theirs has stopped, ours
    prunes to the final density."""
    cases = golden.load("granet_schedules")["cases"]
    cubic = [x for x in cases if "cubic" in x["case"]]
    assert len(cubic) == 4
    for case in cubic:
        total, last = 2000, case["tf_step"]
        method = gs.weights.GraNet(
            case["final_density"], case["init_density"], every=case["update_frequency"],
            begin=case["t0_step"] / total, end=last / total, regrow=False,
        )  # fmt: skip
        weight = torch.rand(100, 1000, generator=torch.Generator().manual_seed(0))
        infos = [LayerInfo("l", (100, 1000), None, weight)]
        masks = {"l": torch.ones(100, 1000, dtype=torch.bool)}
        for step, sparsity in case["step_sparsity"]:
            if step:
                assert method.due(step, total)
            if step > last:
                continue
            (new,) = method.update(step_of(step, total, infos, masks))
            want = 1 - case["final_density"] if sparsity is None else sparsity
            assert 1 - float(new["l"].double().mean()) == pytest.approx(want, abs=1.1e-5)
        assert Cubic(0.5, 0.1)(1.0) == 0.1
    cosine = [x for x in cases if "cosine" in x["case"]]
    assert len(cosine) == 2
    for case in cosine:
        drop = Cosine(case["initial"], case["eta_min"])
        for step, value in case["step_value"]:
            assert drop(step / case["T_max"]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("name", ["conv", "lin"])
def test_issp_shrinks_the_same_weights_by_as_much(name, case):
    """Theirs shrinks ceil(n * ratio), at most int(0.995 n); ours what the density leaves, so it is
    asked for the density that leaves as many."""
    record = golden.load("issp_shrink")
    want = record["cases"][case]
    alpha = [0.95, 0.5, 0.0, 0.95][case]
    ratio = [0.9, 0.5, 0.95, 0.999][case]
    assert f"ratio {alpha}, pruning ratio {ratio}, selection min:" in want["case"]
    weight = golden.draw(record["inputs"], name)
    n = weight.numel()
    count = want["steps"][0][name]["shrunk_count"]
    assert count == min(math.ceil(ratio * n), int(0.995 * n))
    method = gs.weights.ISSP((n - count) / n, alpha)
    for step, after in enumerate(want["steps"], 1):
        info = LayerInfo("l", tuple(weight.shape), None, weight.flatten(1))
        new = method.edit_weights(step_of(step, 100, [info]))["l"].reshape(weight.shape)
        golden.close(new, after[name]["weight"])
        if step == 1:
            assert golden.is_mask(new != weight, after[name]["shrunk_mask"])
        weight = new


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("penalty", [0.0005, 0.01])
def test_masksparsity_gradients_in_the_loop(penalty, targeted):
    record = golden.load("masksparsity_gradients")
    gamma = golden.draw(record["inputs"], "gamma")
    gamma[:4] = torch.tensor([0.0, 0.005, -0.005, 0.02])
    gone = gamma.abs() < 0.15
    assert golden.is_mask(gone, record["inputs"]["to_prune"])
    task = golden.draw(record["inputs"], "task_grad")
    name = "stage 3: masked L1" if targeted else "stage 2: global L1"
    (want,) = [x for x in record["cases"] if x["case"].startswith(name) and x["lambda"] == penalty]
    model = nn.Sequential(nn.Linear(3, 24), nn.BatchNorm1d(24), nn.Linear(24, 2))
    model[1].weight.data.copy_(gamma)
    model[1].weight.grad = task.clone()
    method = gs.weights.MaskSparsity(
        0.5, (gs.Coupled(24, ("0",), ("1",), (), ("2",)),), penalty, targeted=targeted,
        masks={"1": ~gone} if targeted else None,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.sparse_training(model, optimizer, method, total_steps=100):
        optimizer.step()
    golden.close(model[1].weight.grad, want["gamma_grad"])
    torch.testing.assert_close(
        model[1].weight.detach(), gamma - 0.1 * torch.tensor(want["gamma_grad"]["values"])
    )


def test_progressive_gradient_flow_masks():
    """Groups along inputs. Groups along outputs are not built; the unstructured one rounds down."""
    record = golden.load("pgf_mdgf_sdgf")
    weight = golden.draw(record["inputs"], "W")
    cases = [x for x in record["cases"] if x.get("axis") == "groups along in"]
    assert len(cases) == 3
    for case in cases:
        pattern = gs.NM(case["N_kept"], case["M"])
        info = LayerInfo("l", (8, 32), None, weight)
        (masks,) = gs.weights.SdGf(pattern, begin=0.0, end=0.5).update(step_of(9, 10, [info]))
        assert golden.is_mask(masks["l"], case["mask"])


def test_progressive_gradient_flow_frames():
    """Structure decay begins each frame in the same step. Densify is not built."""
    tables = [x for x in golden.load("pgf_mdgf_sdgf")["cases"] if "SdGf" in x.get("type", "")]
    assert len(tables) == 10
    for table in tables:
        total = table["total_epochs"]
        decay = table["type"].split()[1]
        first, last = table["dense_epochs"], total - table["fine_tune_epochs"]
        method = gs.weights.SdGf(
            gs.NM(table["N"], table["M"]), decay, begin=first / total, end=last / total
        )
        found = {t: f"{x.keep}:{x.group}" for t in range(first, total)
                 for x in [method.frame(t, total)]}  # fmt: skip
        starts = [[first, found[first]]]
        starts += [[t, found[t]] for s, t in pairwise(range(first, total)) if found[t] != found[s]]
        assert starts == table["epoch_to_pattern"], table
        assert method.due(first, total) and (first == 0 or not method.due(first - 1, total))


def test_srste_forward_and_refined_gradient_in_the_loop():
    record = golden.load("srste")
    inputs = record["inputs"]
    cases = [x for x in record["cases"] if "refined_gradient" in x]
    assert len(cases) == 7
    for case in cases:
        conv = "conv" in case["case"]
        weight = golden.draw(inputs, "Wconv" if conv else "W")
        gradient = golden.draw(inputs, "Gconv" if conv else "G")
        layer = nn.Conv2d(8, 4, 3, bias=False) if conv else linear(weight)
        layer.weight.data.copy_(weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        method = gs.weights.SRSTE(gs.NM(case["N_kept"], case["M"]), 2e-4)
        with gs.sparse_training(layer, optimizer, method, total_steps=1, include=("",)) as run:
            forward = layer.weight.detach().clone()
            assert golden.is_mask(forward != 0, case["mask"])
            golden.close(forward, case["forward"])
            layer.weight.grad = gradient.clone()
            optimizer.step()
            golden.close(layer.weight.grad, case["refined_gradient"])
            hidden = run.layers[0].tensor(run.state_dict()["hidden"][""])
            torch.testing.assert_close(hidden, weight - layer.weight.grad)


def test_srste_ties_keep_exact_counts():
    """Which of equal weights stays is not fixed there; here it is the lower index."""
    record = golden.load("srste")
    weight = torch.tensor(record["inputs"]["Wties"]["values"]).float()
    mask = select(weight.abs(), gs.NM(2, 4), 0.5).mask
    assert mask.reshape(-1, 4).sum(1).tolist() == [2, 2, 2, 2]
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]]
    (want,) = [x for x in record["cases"] if "ties" in x["case"]]
    shown = (weight * mask != 0).reshape(-1, 4).sum(1).tolist()
    assert shown == want["forward_nonzero_per_group"]


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05])
def test_snip_masks(density):
    record = golden.load("snip_grasp_synflow")
    inputs = record["inputs"]
    model = nn.Sequential()
    for i in (1, 2, 3):
        layer = nn.Linear(*reversed(inputs[f"W{i}"]["shape"]))
        layer.weight.data.copy_(golden.draw(inputs, f"W{i}"))
        layer.bias.data.copy_(golden.draw(inputs, f"b{i}"))
        model.extend([layer, nn.ReLU()][: 2 if i < 3 else 1])
    x, y = golden.draw(inputs, "X"), torch.tensor(inputs["y"]["values"])
    cases = [c for c in record["cases"] if c["case"].startswith("SNIP")]
    (want,) = [c for c in cases if c["density"] == density]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.sparse_training(
        model, optimizer, gs.weights.SNIP(density), total_steps=1, include=("*",),
        loss=lambda: nn.functional.cross_entropy(model(x), y),
    ) as run:  # fmt: skip
        for name, layer in (("f1", "0"), ("f2", "2"), ("f3", "4")):
            assert golden.is_mask(run.masks[layer], want["mask"][name])


def soup(evaluate=None):
    """The mean of the record's three members, through a round of SparseModelSoups."""
    record = golden.load("sms_soup")
    inputs = record["inputs"]
    mask = golden.draw(inputs, "u") < 0.4
    assert golden.is_mask(mask, inputs["mask"])
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    # the dense training leaves weights of which one round keeps just the record's support
    model[0].weight.data.copy_(torch.where(mask, 2.0, 1.0))

    def train(model, method, part):
        if part.index == 0:
            return
        with torch.no_grad():
            model[0].weight.copy_(golden.draw(inputs, f"W{part.member}") * mask)
            model[0].bias.copy_(golden.draw(inputs, f"b{part.member}"))
            model[1].running_mean.copy_(golden.draw(inputs, f"running_mean{part.member}"))

    method = gs.weights.SparseModelSoups(11 / 35, rounds=1, members=3)
    result = gs.train_rounds(
        model, method, train, include=("*",), data=[torch.zeros(4, 7)], evaluate=evaluate
    )
    assert golden.is_mask(result.supports["0"].mask, inputs["mask"])
    return model, {case["case"]: case for case in record["cases"]}


def test_the_uniform_soup():
    """Weights and biases are averaged as released. Statistics of norms are averaged there and taken
    anew later; here they are taken anew at once, and counters are not averaged."""
    model, cases = soup()
    golden.close(
        model[0].weight.detach(), cases["uniform soup after enforce_prunedness"]["weight_orig"]
    )
    dense = cases["average_models before enforce_prunedness (3 models, uniform)"]
    golden.close(model[0].bias.detach(), dense["bias"])
    torch.testing.assert_close(model[1].running_mean, model[0].bias.detach())


def test_the_greedy_soup_tries_the_same_mixtures():
    inputs = golden.load("sms_soup")["inputs"]
    biases = [golden.draw(inputs, f"b{i}") for i in range(3)]
    scores = {(i,): value for i, value in enumerate(inputs["validation_accuracy"]["values"])}
    scores |= {
        tuple(sorted(int(i) for i in key.split(","))): value
        for key, value in inputs["validation_accuracy_of_trial_soups"]["values"].items()
    }
    tried = []

    def evaluate(model):
        for members in scores:
            mean = torch.stack([biases[i] for i in members]).mean(0)
            if torch.allclose(model[0].bias, mean, atol=1e-6):
                tried.append(members)
                return scores[members]
        raise AssertionError("a mixture that the record has not")

    model, cases = soup(evaluate)
    want = cases["greedy soup"]
    golden.close(model[0].weight.detach(), want["weight_orig"])
    # the last of theirs is the chosen mixture, built once more
    assert tried[3:] == [tuple(sorted(x)) for x in want["trials_in_order"][:2]]
    mean = torch.stack([biases[i] for i in want["selected"]]).mean(0)
    torch.testing.assert_close(model[0].bias.detach(), mean)
