"""MoA: what a pair is worth, plans against exhaustive search, and plans as data."""

import itertools
import json
import sys

import pytest
import torch
from maps import attended, logits_of, normal_call

import gossamer as gs
from gossamer.core.attention import AttentionCall
from gossamer.methods.attention.moa import by_distance, influence, removal
from gossamer.methods.attention.moa_plan import (
    Plan,
    costs_of,
    plan_of,
    rules_for,
    share,
    window,
)
from gossamer.methods.attention.moa_programme import Question, fronts


def doubled(call):
    """The same in float64."""
    parts = (x.double() for x in (call.query, call.key, call.value))
    return AttentionCall(*parts, call.scale, call.causal)


def test_the_influence_of_a_pair_is_the_first_order_change_of_its_removal():
    call = doubled(normal_call(12, heads=2))
    gradient = torch.randn(call.query.shape, dtype=torch.float64)
    weights = logits_of(call).softmax(-1)
    slopes = gradient @ call.value.transpose(-1, -2)  # of the loss, by the weights
    found = removal(weights, slopes)
    for row, column in [(1, 0), (1, 1), (7, 3), (11, 11), (11, 0)]:
        logits = logits_of(call)
        logits[:, :, row, column] = -torch.inf
        change = (slopes * (logits.softmax(-1) - weights))[:, :, row].sum(-1)
        torch.testing.assert_close(found[:, :, row, column], change, rtol=0, atol=1e-14)
    # Without renormalisation the figure is another one.
    plain = -weights * slopes
    assert not torch.allclose(plain[:, :, 1:], found[:, :, 1:], rtol=0.1)
    # The first row has one key: nothing is left to be renormalised.
    torch.testing.assert_close(found[:, :, 0, 0], plain[:, :, 0, 0])
    assert found.isfinite().all()


@pytest.mark.parametrize("length", [16, 21])
def test_tiles_hold_sums_of_absolute_influences(length):
    call = doubled(normal_call(length, heads=2, batch=2))
    gradient = torch.randn(call.query.shape, dtype=torch.float64)
    slopes = gradient @ call.value.transpose(-1, -2)
    every = removal(logits_of(call).softmax(-1), slopes).abs()
    found = influence(call, gradient, 8)
    blocks = -(-length // 8)
    assert found.shape == (2, 2, blocks, blocks)
    for row, column in itertools.product(range(blocks), repeat=2):
        tile = every[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        torch.testing.assert_close(found[:, :, row, column], tile.sum((2, 3)))


def test_no_more_than_one_block_of_queries_is_alive():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.most = max(self.most, found.numel())
            return found

    call = normal_call(512)
    with Largest() as largest:
        influence(call, torch.randn(call.query.shape), 32)
    assert largest.most == 2 * 32 * 512


def test_costs_are_what_lies_beyond_the_window_but_not_in_the_first_block():
    tiles = torch.rand(3, 6, 6).tril()
    rules = [(8, 0.0), (24, 0.0), (0, 0.5), (0, 1.0)]
    found = costs_of(by_distance(tiles), rules, 48, 8)
    row, column = torch.arange(6).unsqueeze(1), torch.arange(6)
    for index, rule in enumerate(rules):
        lost = (column > 0) & (row - column >= window(rule, 48, 8))
        torch.testing.assert_close(found[:, index], (tiles * lost).sum((1, 2)).double())


@pytest.mark.parametrize(
    ("rule", "keys", "blocks"),
    [((0, 0.5), 100, 1), ((0, 0.5), 256, 2), ((-64, 0.5), 1024, 7), ((100, 0.0), 999, 1),
     ((-1024, 1.0), 1100, 1), ((64, 0.125), 1024, 3)],
)  # fmt: skip
def test_windows_are_rounded_down_to_blocks_and_hold_one_at_least(rule, keys, blocks):
    assert window(rule, keys, 64) == blocks
    assert share(rule, keys, 64) == (blocks + 1) / -(-keys // 64)


def test_rules_stay_within_every_length():
    rules = rules_for([256, 512, 1024], 32, 128)
    assert (0, 1.0) in rules and all(b >= 0 for _, b in rules)
    assert all(0 < a + b * keys <= keys for a, b in rules for keys in (256, 512, 1024))
    windows = {tuple(window(rule, keys, 32) for keys in (256, 512, 1024)) for rule in rules}
    assert len(windows) == len(rules) > 10


def planted(kinds, blocks):
    """Influence by distance: local heads fall off at once, long ones at half of the text."""
    distances = torch.arange(blocks).float()
    local = torch.exp(-2 * distances)
    far = torch.where(distances < blocks // 2, 1.0, 0.01)
    return torch.stack([far if kind == "far" else local for kind in kinds])


def observed(layers, lengths=(16, 32, 64), block=8):
    return {
        index: [(blocks * block, planted(kinds, blocks)) for blocks in lengths]
        for index, kinds in enumerate(layers)
    }


LAYERS = (("near", "far"), ("near", "near"))


def test_the_long_head_gets_the_window_that_grows_and_the_plan_beats_a_uniform_one():
    plan = plan_of(observed(LAYERS), 0.3, 8, 32, 2)
    betas = [beta for layer in plan.rules for _, beta in layer]
    assert betas[1] == max(betas) > 0 and betas.count(betas[1]) == 1
    for blocks in (16, 32, 64):
        windows = [x for layer in (0, 1) for x in plan.windows(layer, blocks * 8)]
        assert windows[1] > max(windows[0], *windows[2:])
    for blocks in (16, 32):
        assert 0.27 - 1e-9 <= plan.density(blocks * 8) <= 0.3 + 1e-9
    uniform = Plan(8, (((0, 0.25),) * 2,) * 2)

    def lost(plan, blocks):
        parts = [
            costs_of(planted(LAYERS[layer], blocks)[head : head + 1], [rule], blocks * 8, 8)
            for layer, rules in enumerate(plan.rules)
            for head, rule in enumerate(rules)
        ]
        return float(sum(parts))

    for blocks in (16, 32, 64):
        assert plan.density(blocks * 8) <= uniform.density(blocks * 8) + 0.02
        assert lost(plan, blocks) < 0.5 * lost(uniform, blocks)


@pytest.mark.parametrize("limit", [1, 2])
def test_plans_are_the_best_of_an_exhaustive_search(limit):
    generator = torch.Generator().manual_seed(limit)
    costs = torch.rand(1, 4, 5, generator=generator).double().sort(-1, descending=True).values
    shares = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9]])
    asked = Question(costs, shares, 0.5, 2, limit)
    (found,) = fronts(asked)
    valid = [
        plan
        for plan in itertools.product(range(5), repeat=4)
        if 0.45 - 1e-6 <= shares[0, list(plan)].mean() <= 0.5 + 1e-6
        and len(set(plan[:2])) <= limit
        and len(set(plan[2:])) <= limit
    ]
    values = [float(costs[0, range(4), list(plan)].sum()) for plan in valid]
    assert tuple(found.tolist()) in valid
    assert float(costs[0, range(4), found].sum()) == pytest.approx(min(values), rel=1e-3)


def test_no_plan_of_the_front_beats_another_and_bounds_find_more_than_the_ends():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(2, 6, 6, generator=generator).double()
    shares = torch.full((1, 6), 0.5)
    plans = fronts(Question(costs, shares, 0.5, 3, 3))
    values = torch.stack([costs[:, range(6), plan].sum(-1) for plan in plans])
    assert len(plans) > 2
    for one, other in itertools.permutations(values, 2):
        assert not ((one <= other).all() and (one < other).any())


def test_the_longest_prompts_choose_among_the_plans(monkeypatch):
    rules = rules_for([64, 128, 256], 8, 16)
    large, small = rules.index((0, 1.0)), rules.index((0, 0.125))
    both = [torch.tensor([large, small]), torch.tensor([small, large])]
    monkeypatch.setattr("gossamer.methods.attention.moa_plan.fronts", lambda asked: both)
    for matters in (0, 1):
        last = torch.zeros(2, 32)
        last[matters] = 1.0
        seen = {0: [(64, torch.rand(2, 8)), (128, torch.rand(2, 16)), (256, last)]}
        plan = plan_of(seen, 0.5, 8, 16, 2)
        assert plan.rules[0][matters] == (0, 1.0) and plan.rules[0][1 - matters] == (0, 0.125)


def test_prompts_of_one_length_are_averaged():
    many = {0: [(64, torch.rand(1, 8)) for _ in range(3)]}
    mean = {0: [(64, torch.stack([x for _, x in many[0]]).mean(0))]}
    assert plan_of(many, 0.5, 8, 8, 2) == plan_of(mean, 0.5, 8, 8, 2)


@pytest.mark.parametrize(("length", "past"), [(64, 0), (70, 0), (30, 34), (128, 0)])
def test_the_layout_is_the_first_block_and_each_heads_window(length, past):
    plan = Plan(8, (((16, 0.0), (0, 0.5)),))
    call = normal_call(length, past=past, heads=4, kv_heads=2)
    mask = attended(gs.attention.MoA(plan=plan).layout(call), call)
    row = (torch.arange(0, length, 8) // 8 * 8 + past).repeat_interleave(8)[:length] // 8
    column = torch.arange(length + past) // 8
    causal = torch.ones(length, length + past, dtype=torch.bool).tril(past)
    for head, blocks in ((0, 2), (1, 2), (2, (length + past) // 8 // 2), (3, None)):
        blocks = (length + past) // 8 // 2 if blocks is None else blocks
        wanted = (column == 0) | (column > (row.unsqueeze(1) - blocks))
        assert torch.equal(mask[0, head], wanted & causal), head


def test_a_plan_is_a_file(tmp_path):
    plan = Plan(16, (((-32, 0.5), (16, 0.25)),))
    path = tmp_path / "plan.json"
    gs.attention.MoA(plan=plan).save(path)
    assert gs.attention.MoA(plan=str(path)).plan == plan
    method = gs.find("moa")(plan=str(path))
    call = normal_call(100, heads=4, kv_heads=2)
    assert torch.equal(
        attended(method.layout(call), call),
        attended(gs.attention.MoA(plan=plan).layout(call), call),
    )
    good = json.loads(path.read_text())
    for bad in (
        "[", "[]", good | {"version": 2}, good | {"more": 1}, good | {"rules": []},
        good | {"rules": [[[1]]]}, good | {"rules": [[[0, 0.5]], [[0, 0.5], [0, 1]]]},
        good | {"rules": [[[0, 7.0]]]}, good | {"block": 0}, good | {"rules": 3},
    ):  # fmt: skip
        path.write_text(bad if isinstance(bad, str) else json.dumps(bad))
        with pytest.raises(gs.FormatError, match=r"plan\.json"):
            gs.attention.MoA(plan=str(path))
    with pytest.raises(gs.UsageError, match="no plan"):
        gs.attention.MoA(plan=str(tmp_path / "none.json"))


def texts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, length), generator=generator) for length in lengths]


def test_calibration_takes_a_model_and_prompts_and_leaves_it(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    method = gs.attention.MoA(density=0.6, block=8, step=8, answer=4)
    found, again = (gs.calibrate_attention(model, method, texts(40, 60, 92)) for _ in range(2))
    assert found.plan == again.plan and method.plan is None
    assert len(found.plan.rules) == 2 and len(found.plan.rules[0]) == 2
    assert all(0.54 - 1e-6 <= found.plan.density(keys) <= 0.6 + 1e-6 for keys in (44, 64, 96, 128))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] and model.training is False
    assert all(p.grad is None for p in model.parameters())
    with gs.sparse_attention(model, found, dense_below=0) as run, torch.no_grad():
        model(texts(120)[0])
    assert run.result.density < 0.95 and run.result.calls == 2


def test_what_is_observed_is_the_loss_of_the_models_own_answer(tiny_llama):
    model, seen = tiny_llama(layers=1), []

    class Watch:
        card, answer = gs.attention.MoA.card, 5

        def layout(self, call):
            raise AssertionError("calibration is dense")

        def observe_gradient(self, call, gradient):
            seen.append((call, gradient))

        def fitted(self, observed):
            return self

    (ids,) = texts(20)
    gs.calibrate_attention(model, Watch(), [ids])
    ((call, gradient),) = seen
    assert call.keys == 25
    # The same by hand: greedy tokens, and the gradient of what o_proj is given.
    text = ids
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    inputs = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    logits = model(text).logits[:, 19:-1]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 20:].flatten())
    wanted = torch.autograd.grad(loss, inputs)[0].unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-7)


def test_what_cannot_be_planned_is_named(tiny_llama, monkeypatch):
    model, method = tiny_llama(layers=1), gs.attention.MoA(block=8, step=8, answer=2)
    with pytest.raises(gs.UsageError, match="calibrate_attention"):
        method.layout(normal_call(40))
    with pytest.raises(gs.UsageError, match="calibrate_attention"):
        method.save("plan.json")
    with pytest.raises(gs.UsageError, match="another model"):
        gs.attention.MoA(plan=Plan(8, (((0, 0.5),) * 3,))).layout(normal_call(40, heads=4))
    with pytest.raises(gs.UsageError, match="6 lengths"):
        gs.calibrate_attention(model, method, texts(16, 24, 32, 40, 48, 56))
    padded = {"input_ids": texts(20)[0], "attention_mask": torch.ones(2, 20)}
    padded["attention_mask"][0, :3] = 0
    with pytest.raises(gs.UsageError, match="padding"):
        gs.calibrate_attention(model, method, [padded])
    with pytest.raises(gs.UsageError, match="no plan keeps"):
        gs.calibrate_attention(model, gs.attention.MoA(density=0.01, block=8, step=8), texts(40))
    for bad in ({"density": 0}, {"block": 0}, {"step": 1.5}, {"rules": 0}, {"answer": 0}):
        with pytest.raises(gs.UsageError):
            gs.attention.MoA(**bad)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(gs.MissingExtra, match=r"gossamer\[scipy\]"):
        gs.calibrate_attention(model, method, texts(40))
