"""Small models of transformers with random weights, one of each family, and inputs for them."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 16}


def make(family, **extra):
    """A tiny model of a family with random weights."""
    config_of, class_of, options = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", GQA),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GQA),
        "mistral": ("MistralConfig", "MistralForCausalLM", GQA | {"sliding_window": None}),
        "gemma": ("GemmaConfig", "GemmaForCausalLM", GQA),
        "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
        "bert": ("BertConfig", "BertModel", SMALL),
        "vit": ("ViTConfig", "ViTModel", SMALL | {"image_size": 64, "patch_size": 8}),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GQA),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GQA),
        "gptoss": ("GptOssConfig", "GptOssForCausalLM", GQA | {
            "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2,
        }),
        "t5": ("T5Config", "T5ForConditionalGeneration", {
            "vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1,
            "num_heads": 4,
        }),
    }[family]  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, config_of)(**(options | extra))
    return getattr(transformers, class_of)(config).eval()


def inputs(family, length=100, batch=1):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 64, 64, generator=generator)}
    return {"input_ids": torch.randint(1, 256, (batch, length), generator=generator)}
