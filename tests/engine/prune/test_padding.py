"""Padding does not count, wherever tokens went; where it cannot be told, the result says so."""

import copy

import pytest
import torch
from examples import PRUNERS
from torch import nn

from gossamer.engine.prune.padding import Padding, is_two_sided, padding_of, real_rows
from gossamer.engine.prune.run import prune

Wanda = PRUNERS["wanda"]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MASK = (torch.arange(11) < 7).long()[None].repeat(2, 1)
MASK[1, 5:] = 0


def rows_kept(x):
    kept = real_rows(x, MASK.bool())
    return None if kept is None else kept.shape


def test_shapes_that_can_be_told():
    assert rows_kept(torch.randn(2, 11, 4)) == (12, 4)
    assert rows_kept(torch.randn(2, 11, 3, 4)) == (36, 4)
    assert rows_kept(torch.randn(22, 4)) == (12, 4)
    assert rows_kept(torch.randn(11, 2, 4)) == (12, 4)
    assert rows_kept(torch.randn(2, 3, 11, 4)) == (36, 4)
    assert rows_kept(torch.randn(2, 4)) == (2, 4)
    assert rows_kept(torch.randn(9, 4)) is None
    x = torch.randn(2, 11, 4)
    first = real_rows(x, MASK.bool())
    assert torch.equal(first, real_rows(x.reshape(-1, 4), MASK.bool()))
    assert torch.equal(
        first.sort(0).values, real_rows(x.transpose(0, 1), MASK.bool()).sort(0).values
    )


def test_sides_of_an_encoder_decoder():
    encoder, decoder = MASK.bool(), MASK[:, :8].bool()
    both = Padding(encoder, decoder, 8, two_sided=True)
    assert both.mask_of("model.encoder.layers.0.self_attn.k_proj") is encoder
    assert both.mask_of("model.decoder.layers.0.self_attn.k_proj") is decoder
    assert both.mask_of("model.decoder.layers.0.encoder_attn.k_proj") is encoder
    assert both.mask_of("model.decoder.layers.0.encoder_attn.q_proj") is decoder
    assert both.mask_of("decoder.block.0.layer.1.EncDecAttention.v") is encoder
    assert both.mask_of("decoder.layers.0.multihead_attn.in_proj_weight.k") is encoder
    assert both.mask_of("decoder.layers.0.other.mix", (2, 11, 4)) is encoder
    assert both.mask_of("decoder.layers.0.other.mix", (2, 8, 4)) is decoder
    alone = Padding(encoder, None, 11, two_sided=True)
    assert alone.mask_of("decoder.layers.0.fc1", (2, 11, 4)) is None
    assert Padding(encoder).mask_of("model.decoder.layers.0.fc1") is encoder
    assert Padding(encoder, text=True).mask_of("model.vision_tower.layers.0.fc1") is None


def test_a_decoder_beside_an_encoder():
    assert is_two_sided(["", "encoder", "decoder", "decoder.layers"])
    assert is_two_sided(["model", "model.encoder", "model.decoder"])
    assert not is_two_sided(["model.decoder", "model.decoder.layers"])
    assert not is_two_sided(["vision.encoder", "text.model.decoder"])


def test_masks_of_a_batch():
    assert padding_of(torch.ones(2, 3), False) is None
    assert padding_of({"attention_mask": torch.ones(2, 3)}, False) is None
    torch_mask = padding_of({"x": MASK, "src_key_padding_mask": MASK == 0}, False)
    assert torch.equal(torch_mask.encoder, MASK.bool())
    floating = padding_of({"key_padding_mask": torch.where(MASK > 0, 0.0, -torch.inf)}, False)
    assert torch.equal(floating.encoder, MASK.bool())


def bare_and_padded(model, batches, padded, method=None):
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    method = method or Wanda()
    one = prune(first, method, density=0.5, data=batches)
    two = prune(second, method, density=0.5, data=padded)
    assert list(one.supports) == list(two.supports)
    return {
        name: float((support.mask != two.supports[name].mask).float().mean())
        for name, support in one.supports.items()
    }, two


def decoder_only(kind):
    t = pytest.importorskip("transformers")
    sizes = {**SMALL, "num_key_value_heads": 2}
    match kind:
        case "opt":
            return t.OPTForCausalLM(
                t.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
            )
        case "qwen2-moe":
            return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(
                **sizes, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
                shared_expert_intermediate_size=32, num_experts_per_tok=2,
            ))  # fmt: skip
        case "gpt-oss":
            return t.GptOssForCausalLM(t.GptOssConfig(
                **sizes, intermediate_size=32, head_dim=8, num_local_experts=4,
            ))  # fmt: skip


@pytest.mark.parametrize("kind", ["opt", "qwen2-moe", "gpt-oss"])
def test_flattened_and_routed_tokens(kind):
    torch.manual_seed(0)
    model, ids = decoder_only(kind), torch.randint(3, 64, (2, 24))
    mask = (torch.arange(40) < 24).long().repeat(2, 1)
    padded = torch.cat([ids, torch.full((2, 16), 1)], 1)
    off, result = bare_and_padded(
        model, [{"input_ids": ids}], [{"input_ids": padded, "attention_mask": mask}]
    )
    assert max(off.values()) < 0.005, off
    assert not result.notes


@pytest.mark.parametrize("length", [24, 16])
def test_encoder_and_decoder_masks_are_told_apart(length):
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    ids, inner = torch.randint(3, 64, (2, 16)), torch.randint(3, 64, (2, 12))
    pad = torch.zeros(2, 8, dtype=torch.long)
    more = length - 12
    padded = {
        "input_ids": torch.cat([ids, pad], 1),
        "attention_mask": (torch.arange(24) < 16).long().repeat(2, 1),
        "decoder_input_ids": torch.cat([inner, torch.zeros(2, more, dtype=torch.long)], 1),
        "decoder_attention_mask": (torch.arange(length) < 12).long().repeat(2, 1),
    }
    off, result = bare_and_padded(model, [{"input_ids": ids, "decoder_input_ids": inner}], [padded])
    assert max(off.values()) < 0.005, off
    assert not result.notes


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_masks(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = nn.Transformer(16, 2, 1, 1, 32, batch_first=batch_first)

        def forward(self, x, y, src_key_padding_mask=None, tgt_key_padding_mask=None):
            if not batch_first:
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            return self.t(
                x, y, src_key_padding_mask=src_key_padding_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=src_key_padding_mask,
            )  # fmt: skip

    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(3, 8, 16), torch.randn(3, 6, 16)
    padded = {
        "x": torch.cat([x, 50 * torch.randn(3, 5, 16)], 1),
        "y": torch.cat([y, 50 * torch.randn(3, 3, 16)], 1),
        "src_key_padding_mask": (torch.arange(13) >= 8).repeat(3, 1),
        "tgt_key_padding_mask": (torch.arange(9) >= 6).repeat(3, 1),
    }
    off, result = bare_and_padded(model, [{"x": x, "y": y}], [padded])
    assert max(off.values()) < 0.005, off
    assert not result.notes


def test_tokens_that_pass_through_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.f = nn.Conv1d(8, 8, 1), nn.Linear(8, 8)

        def forward(self, x, attention_mask=None):
            return self.f(self.c(x.transpose(1, 2)).transpose(1, 2))

    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    padded = torch.cat([x, 50 * torch.randn(2, 3, 8)], 1)
    mask = (torch.arange(9) < 6).long().repeat(2, 1)
    off, _ = bare_and_padded(Net(), [{"x": x}], [{"x": padded, "attention_mask": mask}])
    assert max(off.values()) == 0


def test_what_cannot_be_told_is_said():
    class Gather(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.some = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.some(self.all(x)[:, ::2])

    x, mask = torch.randn(2, 9, 8), (torch.arange(9) < 6).long().repeat(2, 1)
    result = prune(Gather(), Wanda(), density=0.5, data=[{"x": x, "attention_mask": mask}])
    assert len(result.notes) == 1 and "some" in result.notes[0] and "all" not in result.notes[0]
    assert result.notes[0] in str(result)


def test_nan_at_padded_positions_is_no_error():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            x = self.f(x).masked_fill(~attention_mask.bool()[..., None], torch.nan)
            return self.g(x)

    batch = {"x": torch.randn(2, 6, 8), "attention_mask": (torch.arange(6) < 4).long().repeat(2, 1)}
    assert prune(Net(), Wanda(), density=0.5, data=[batch]).measured_density == 0.5
