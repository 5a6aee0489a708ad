"""The compiled decoding step against transformers, token by token and logit by logit."""

import os

import pytest
import torch

import gossamer as gs
from gossamer.core.errors import UsageError
from gossamer.engine.serve.decoder import Decoder, refusal
from gossamer.engine.serve.generate import generate
from gossamer.nn import NMLinear, QuantizedLinear
from gossamer.ops._dispatch import ISAS, kernels

transformers = pytest.importorskip("transformers")
if kernels() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)


def build(family="Llama", **other):
    config = {
        "vocab_size": 97,
        "hidden_size": 72,  # not a multiple of a vector or of a bitmap word
        "intermediate_size": 150,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config.update(other)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(getattr(transformers, f"{family}Config")(**config)).eval()
    for parameter in model.parameters():  # norms and biases too: none may stay at its default
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def prompt(tokens=7):
    return torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(1))


CASES = [
    ("Llama", {}),
    ("Llama", {"head_dim": 20, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("Qwen2", {}),
    ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("family", "other"), CASES)
@pytest.mark.parametrize("by_columns", ["", "up_proj", "_proj"])
def test_every_logit_is_that_of_transformers(family, other, isa, by_columns, monkeypatch):
    if ISAS.index(isa) > kernels().best_isa():
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setitem(os.environ, "GOSSAMER_ISA", isa)
    model, ids = build(family, **other), prompt()
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    with torch.inference_mode():
        expected = model(input_ids=torch.cat([ids, prompt(20)], dim=1)).logits[0, 6:]
    gs.compress(model)
    for name, module in model.named_modules():
        if by_columns and by_columns in name:
            module.prepare_columns()
    with torch.inference_mode():
        decoder = Decoder(model, 27)
        found = [decoder.prefill(ids)] + [decoder.step(int(t)).clone() for t in prompt(20)[0]]
    torch.testing.assert_close(torch.stack(found), expected, atol=2e-5, rtol=1e-4)


def test_dense_layers_are_served_too_and_tokens_agree():
    model, ids = build(), prompt()
    expected = generate(model, ids, 30, compiled=False)
    assert torch.equal(generate(model, ids, 30, compiled=True), expected)


def test_generate_takes_the_compiled_loop_by_itself(monkeypatch):
    model, ids = build(), prompt()
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    expected = generate(model, ids, 30)
    gs.compress(model)
    calls = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, token: calls.append(1) or step(self, token))
    assert torch.equal(generate(model, ids, 30), expected)
    assert len(calls) == 29
    eos = int(expected[0, 7 + 11])
    stopped = generate(model, ids, 30, eos=eos)
    assert torch.equal(stopped, generate(model, ids, 30, eos=eos, compiled=False))


def test_bfloat16_stays_close_to_transformers():
    model, ids = build().bfloat16(), prompt()
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    with torch.inference_mode():
        expected = model(input_ids=torch.cat([ids, prompt(20)], dim=1)).logits[0, -1].float()
        gs.compress(model)
        decoder = Decoder(model, 27)
        decoder.prefill(ids)
        for token in prompt(20)[0]:
            found = decoder.step(int(token))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_refusals_name_the_reason():
    assert "silu" in refusal(build(hidden_act="gelu"), 8)
    assert "sliding window" in refusal(build("Mistral", sliding_window=16), 32)
    assert refusal(build("Mistral", sliding_window=16), 16) is None
    assert "GPT2LMHeadModel" in refusal(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)
        ),
        8,
    )
    assert "float16" in refusal(build().half(), 8)
    hooked = build()
    hooked.model.layers[0].mlp._forward_hooks[0] = lambda *_: None
    assert "hooks" in refusal(hooked, 8)
    with pytest.raises(UsageError, match="batch 1"):
        generate(build(), prompt().expand(2, -1), 4, compiled=True)


def test_capacity_and_token_range():
    decoder = Decoder(build(), 8)
    with torch.inference_mode():
        decoder.prefill(prompt())
        with pytest.raises(ValueError, match="out of range"):
            decoder.step(97)
        decoder.step(3)
        with pytest.raises(UsageError, match="full"):
            decoder.step(3)
        with pytest.raises(UsageError, match="prompt"):
            decoder.prefill(prompt(9))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_quantised_layers_decode_like_their_dense_weights(bits, threads, over_threads):
    """Against the same weights dense: what is left is the rounding of inputs to 8 bits."""
    model = build(attention_bias=True)
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    gs.compress(model, bits=bits)
    plain = build(attention_bias=True)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.to_matrix()
    ids = prompt()

    @torch.inference_mode()
    def compare():
        ours, theirs = Decoder(model, 40), Decoder(plain, 40)
        ours.prefill(ids), theirs.prefill(ids)
        for token in range(20):
            found, expected = ours.step(token).clone(), theirs.step(token)
            assert (found - expected).norm() < 0.03 * expected.norm()

    over_threads(compare, (threads,))


def test_quantised_decoding_does_not_depend_on_threads(over_threads):
    model = build()
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    gs.compress(model, bits=8)

    @torch.inference_mode()
    def run():
        decoder = Decoder(model, 60)
        decoder.prefill(prompt())
        return torch.stack([decoder.step(t).clone() for t in range(40)])

    one, *others = over_threads(run, (1, 2, 2, 3, 2))
    assert all(torch.equal(one, other) for other in others)


def test_layers_of_several_kinds_decode_together():
    model = build()
    for name, bits in (("q_proj", 4), ("v_proj", 8), ("up_proj", 4), ("o_proj", 8)):
        for layer in model.model.layers:
            part = layer.self_attn if name in ("q_proj", "v_proj", "o_proj") else layer.mlp
            old = getattr(part, name)
            setattr(part, name, QuantizedLinear.from_matrix(old.weight, old.bias, bits=bits))
    decoder = Decoder(model, 30)
    with torch.inference_mode():
        decoder.prefill(prompt())
        found = decoder.step(5).clone()
        expected = model(torch.cat([prompt(), torch.tensor([[5]])], 1)).logits[0, -1]
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:32"])
def test_nm_layers_decode_like_their_dense_weights(pattern, isa, monkeypatch):
    if ISAS.index(isa) > kernels().best_isa():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("GOSSAMER_ISA", isa)
    model, parsed = build(attention_bias=True), gs.parse_pattern(pattern)
    plain = build(attention_bias=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            width = module.in_features // parsed.group * parsed.group
            weight = torch.zeros_like(module.weight)
            part = module.weight[:, :width].detach()
            weight[:, :width] = part * gs.select(part.abs(), parsed, parsed.density).mask
            plain.get_submodule(name).weight.data = weight
            if "k_proj" not in name:  # another kind beside them
                model.set_submodule(name, NMLinear.from_matrix(weight, module.bias, pattern))
            else:
                module.weight.data = weight
    ours, theirs = Decoder(model, 40), Decoder(plain, 40)
    with torch.inference_mode():
        torch.testing.assert_close(ours.prefill(prompt()), theirs.prefill(prompt()))
        for token in range(10):
            torch.testing.assert_close(ours.step(token), theirs.step(token), rtol=1e-4, atol=1e-4)


def test_text_ends_where_the_model_s_configuration_says():
    model, ids = build(), prompt()
    gs.prune(model, gs.weights.Magnitude(), density=0.5)
    gs.compress(model, latency="rule")
    free = generate(model, ids, 20, eos=-1)[0, 7:].tolist()
    assert generate(model, ids, 20, eos=())[0, 7:].tolist() == free
    first = next(token for token in free[3:] if token not in free[:3])
    for ends in (first, [96, first]):
        model.generation_config.eos_token_id = ends
        for compiled in (False, True):
            found = generate(model, ids, 20, compiled=compiled)[0, 7:].tolist()
            assert found == free[: free.index(first) + 1]
        theirs = model.generate(ids, max_new_tokens=20, do_sample=False)[0, 7:].tolist()
        assert theirs == found
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = first
    assert len(generate(model, ids, 20)[0]) == 7 + free.index(first) + 1
    assert len(generate(model, ids, 20, eos=-1)[0]) == 27


def test_rows_that_are_finished_wait_for_the_others():
    model, ids = build(), torch.cat([prompt(), prompt().flip(1)])
    free = generate(model, ids, 12, eos=())[:, 7:]
    end = next(int(t) for t in free[0] if t not in free[1])
    found = generate(model, ids, 12, eos=end)[:, 7:]
    at = free[0].tolist().index(end)
    assert found.shape == free.shape and torch.equal(found[1], free[1])
    assert found[0].tolist() == free[0, :at].tolist() + [end] * (12 - at)


def test_encoder_decoders_are_told_apart():
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"model\.generate"):
        generate(transformers.BartForConditionalGeneration(config), prompt() % 60, 4)


def test_forwards_that_someone_replaced_are_not_skipped():
    model = build()
    model.model.layers[0].mlp.forward = lambda x: x
    assert "forward of its own" in refusal(model, 8)
    other, kind = build(), type("Scaled", (torch.nn.Linear,), {"forward": lambda self, x: x})
    other.model.layers[0].mlp.up_proj.__class__ = kind
    assert "Scaled in place of a linear layer" in refusal(other, 8)
