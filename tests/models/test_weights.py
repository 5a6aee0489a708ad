"""Every matrix has a name, and what stays dense by default has a reason."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import UsageError
from gossamer.models import choose_weights, find_blocks, find_weights
from gossamer.models.layers import EXPECTED


class Experts(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        for name, shape in zip(("gate_up_proj", "down_proj"), shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.randn(shape)))


class Mixture(nn.Module):
    """A gate, experts, and a layer that happens to be called a gate too."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = Experts((4, 12, 8), (4, 8, 6))
        self.attention = nn.ModuleDict({"gate": nn.Linear(8, 8)})


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def reasons(model, **arguments):
    return choose_weights(model, **arguments).left


def test_names_of_every_kind():
    model = Holder(
        a=nn.MultiheadAttention(8, 2), b=nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        r=nn.GRU(3, 4, bidirectional=True), c=nn.LSTMCell(3, 4), t=nn.ConvTranspose1d(2, 4, 3),
        g=nn.Conv2d(4, 4, 3, groups=2), l=nn.Bilinear(2, 3, 4), m=Mixture(),
    )  # fmt: skip
    names = list(find_weights(model))
    assert names[:4] == [f"a.in_proj_weight.{x}" for x in "qkv"] + ["a.out_proj"]
    assert names[4:8] == [f"b.{x}_proj_weight" for x in "qkv"] + ["b.out_proj"]
    assert names[8:12] == [
        "r.weight_ih_l0", "r.weight_hh_l0", "r.weight_ih_l0_reverse", "r.weight_hh_l0_reverse",
    ]  # fmt: skip
    assert names[12:17] == ["c.weight_ih", "c.weight_hh", "t", "g", "l"]
    assert names[17] == "m.gate" and names[18:22] == [
        f"m.experts.gate_up_proj.{index}" for index in range(4)
    ]
    sizes = {
        id(getattr(w.module, w.parameter)): getattr(w.module, w.parameter).numel()
        for w in find_weights(model).values()
    }
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    "shapes, flipped",
    [
        (((4, 12, 8), (4, 8, 6)), False),
        (((4, 8, 12), (4, 6, 8)), True),
        (((4, 8, 8), (4, 8, 8)), False),
        (((4, 16, 8), (4, 8, 8)), False),
    ],
)
def test_how_experts_lie_is_seen_from_their_shapes(shapes, flipped):
    model = Holder(experts=Experts(*shapes))
    assert {w.transposed for w in find_weights(model).values()} == {flipped}
    model.experts.is_transposed = not flipped
    assert {w.transposed for w in find_weights(model).values()} == {not flipped}


def test_routers_stay_dense_and_other_gates_do_not():
    model = Mixture()
    assert reasons(model) == {"gate": EXPECTED["router"]}
    assert "attention.gate" in choose_weights(model).weights
    assert "gate" in choose_weights(model, include=("gate",)).weights


def test_default_choice_has_a_reason_for_everything_else():
    shared = nn.Linear(8, 8)
    model = Holder(
        patch_embed=nn.Conv2d(3, 8, 4), deep=Holder(patch_embed=nn.Conv2d(8, 8, 2)),
        pos_conv_embed=nn.Conv1d(8, 8, 3, groups=2), depthwise=nn.Conv2d(8, 8, 3, groups=8),
        table=nn.Embedding(9, 8), body=nn.Linear(8, 8), again=shared, twin=nn.Linear(8, 8),
        mask_head=nn.Linear(8, 8), classifier=nn.Linear(8, 2),
    )  # fmt: skip
    model.twin.weight = shared.weight
    left = reasons(model, exclude=("body",))
    assert left == {
        "patch_embed": EXPECTED["inputs"], "pos_conv_embed": EXPECTED["inputs"],
        "depthwise": EXPECTED["depthwise"], "table": EXPECTED["embedding"],
        "body": EXPECTED["exclude"], "again": "its weight is tied to twin",
        "twin": "its weight is tied to again", "mask_head": EXPECTED["head"],
        "classifier": EXPECTED["head"],
    }  # fmt: skip
    assert list(choose_weights(model, exclude=("body",)).weights) == ["deep.patch_embed"]
    with pytest.raises(UsageError, match="twin: its weight is tied to again"):
        choose_weights(model, include=("twin",))
    with pytest.raises(UsageError, match="again is left out: its weight is tied to twin"):
        choose_weights(model, exclude=("body", "deep*"))


@pytest.mark.parametrize("parameter", ["weight_hh_l0", "weight_ih_l0"])
def test_recomputed_weights_are_refused_with_the_remedy(parameter):
    model = Holder(first=nn.Linear(3, 3), r=nn.LSTM(3, 4))
    nn.utils.parametrizations.weight_norm(model.r, parameter)
    with pytest.raises(UsageError, match=rf"r\.{parameter}: .*remove_parametrizations"):
        choose_weights(model)
    left = reasons(model, exclude=(f"r.{parameter}",))
    assert left == {f"r.{parameter}": EXPECTED["exclude"]}


def test_layers_with_a_forward_of_their_own_are_left_out_unless_named():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Rows(nn.LSTM):
        def forward(self, x, hx=None):
            return super().forward(x.flip(0), hx)

    model = Holder(a=Doubled(3, 3), b=nn.Conv1d(3, 3, 2), c=nn.Linear(3, 3), r=Rows(3, 3))
    model.b.forward = lambda x: x
    left = reasons(model)
    assert set(left) == {"a", "b", "r.weight_ih_l0", "r.weight_hh_l0"}
    assert "Doubled has a forward of its own" in left["a"]
    assert "replaced on the instance" in left["b"]
    assert "a" in choose_weights(model, include=("a",)).weights


def test_a_module_under_two_names_is_found_by_both():
    layer = nn.Linear(4, 4)
    model = Holder(first=layer, second=layer, other=nn.Linear(4, 4))
    assert list(choose_weights(model).weights) == ["first", "other"]
    assert reasons(model, exclude=("second",)) == {"first": EXPECTED["exclude"]}


def test_a_layer_that_blocks_share_is_in_none_of_them():
    shared = nn.Linear(4, 4)
    model = Holder(layers=nn.ModuleList(Holder(own=nn.Linear(4, 4), same=shared) for _ in range(3)))
    assert choose_weights(model).blocks == {
        "layers.0.own": 0, "layers.0.same": None, "layers.1.own": 1, "layers.2.own": 2,
    }  # fmt: skip


def test_lists_of_bare_layers_are_no_blocks_and_lists_of_lists_are():
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    model = Holder(
        stages=nn.ModuleList(nn.ModuleList(block() for _ in range(n)) for n in (1, 2)),
        mixed=nn.ModuleList([block(), nn.LayerNorm(4), Holder(a=nn.Linear(4, 4))]),
        outputs=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
    )
    prefixes = [prefix for prefix, _ in find_blocks(model)]
    assert prefixes == ["stages.0.0", "stages.1.0", "stages.1.1", "mixed.0", "mixed.1", "mixed.2"]
    choice = choose_weights(model)
    assert len(choice.weights) == 8 and not choice.left
    assert choice.blocks["outputs.1"] is None
