"""Families that read text: decoders, experts, state spaces, encoders, encoder-decoders."""

from __future__ import annotations

from typing import Any

from families import PAD, VOCABULARY, Family, hf, pair, tokens

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
ENDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": PAD,
}  # fmt: skip


def decoder(name: str, model: str, base: dict[str, Any] = SHAPE, **own: Any) -> Family:
    """A causal language model; `own` overrides or widens the shape."""
    config = {**base, **ENDS, **own}
    return hf(name, "text decoder", f"{model}ForCausalLM", tokens, True, **config)


def llama_like(name: str, model: str, **own: Any) -> Family:
    """A decoder with grouped queries."""
    return decoder(name, model, num_key_value_heads=own.pop("num_key_value_heads", 2), **own)


def experts(name: str, model: str, **own: Any) -> Family:
    """A decoder with a mixture of experts."""
    made = llama_like(name, model, **own)
    return Family(name, "experts", made.build, made.batches, True, made.needs)


def states(name: str, model: str, base: dict[str, Any] = SHAPE, **own: Any) -> Family:
    """A decoder with recurrent states, alone or beside attention."""
    made = decoder(name, model, base, **own)
    return Family(name, "state space", made.build, made.batches, True, made.needs)


def encoder(name: str, model: str, base: dict[str, Any] = SHAPE, **own: Any) -> Family:
    """A text encoder or a head on one."""
    return hf(name, "text encoder", model, tokens, **{**base, "pad_token_id": PAD, **own})


def translator(name: str, model: str, base: dict[str, Any] = PAIR, **own: Any) -> Family:
    """An encoder-decoder."""
    config = {**base, **ENDS, **own}
    model = f"{model}ForConditionalGeneration" if not model.endswith("Model") else model
    return hf(name, "encoder-decoder", model, pair, True, **config)


MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
SSM: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
    "conv_kernel": 4, "expand": 2,
}  # fmt: skip

FAMILIES = [
    llama_like("llama", "Llama"),
    llama_like("llama-tied", "Llama", tie_word_embeddings=True),
    llama_like("mistral-window", "Mistral", sliding_window=8),
    llama_like("qwen2-mixed-windows", "Qwen2", sliding_window=8, use_sliding_window=True,
               num_hidden_layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"]),
    llama_like("qwen3", "Qwen3", head_dim=8),
    llama_like("gemma", "Gemma", head_dim=8),
    llama_like("gemma2", "Gemma2", head_dim=8, sliding_window=8),
    llama_like("gemma3", "Gemma3", head_dim=8, sliding_window=8, num_hidden_layers=3,
               layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    llama_like("phi3", "Phi3"),
    llama_like("starcoder2", "Starcoder2"),
    llama_like("olmo2", "Olmo2"),
    llama_like("cohere", "Cohere"),
    llama_like("stablelm", "StableLm"),
    llama_like("glm4", "Glm4", head_dim=8),
    llama_like("smollm3", "SmolLM3"),
    decoder("phi", "Phi"),
    decoder("gpt-neox", "GPTNeoX"),
    decoder("bloom", "Bloom", n_layer=2, n_head=4),
    decoder("falcon", "Falcon"),
    decoder("opt", "OPT", ffn_dim=48, word_embed_proj_dim=32),
    decoder("biogpt", "BioGpt"),
    decoder("mpt", "Mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    decoder("xglm", "XGLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    decoder("gpt-neo", "GPTNeo", num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]], window_size=8),
    hf("gpt2", "text decoder", "GPT2LMHeadModel", tokens, True, **GPT, **ENDS),
    decoder("gptj", "GPTJ", GPT, rotary_dim=4),
    decoder("codegen", "CodeGen", GPT, rotary_dim=4),
    decoder("gpt-bigcode", "GPTBigCode", GPT),
    experts("mixtral", "Mixtral", **LOCAL),
    experts("qwen2-moe", "Qwen2Moe", **MOE, shared_expert_intermediate_size=16),
    experts("qwen3-moe", "Qwen3Moe", **MOE, head_dim=8),
    experts("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2),
    experts("granite-moe", "GraniteMoe", **LOCAL),
    experts("phimoe", "Phimoe", **LOCAL),
    experts("gpt-oss", "GptOss", **LOCAL, head_dim=8, sliding_window=8),
    experts("deepseek-v3", "DeepseekV3", **MLA),
    hf("llama4", "experts", "Llama4ForCausalLM", tokens, True, **SHAPE, **ENDS, **LOCAL,
       num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=2),
    states("mamba", "Mamba", SSM, time_step_rank=32),
    states("mamba2", "Mamba2", SSM, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    states("falcon-mamba", "FalconMamba", SSM, time_step_rank=32),
    hf("rwkv", "state space", "RwkvForCausalLM", tokens, True, vocab_size=VOCABULARY,
       hidden_size=32, num_hidden_layers=2, context_length=64, intermediate_size=48),
    states("jamba", "Jamba", num_key_value_heads=2, num_experts=4, mamba_dt_rank=16,
           mamba_d_state=8, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
           expert_layer_period=2, use_mamba_kernels=False),
    states("bamba", "Bamba", num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=8,
           mamba_d_state=8, mamba_n_groups=1, attn_layer_indices=[1]),
    states("qwen3-next", "Qwen3Next", **MOE, num_key_value_heads=2, head_dim=8,
           shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
           linear_key_head_dim=8, linear_value_head_dim=8,
           layer_types=["linear_attention", "full_attention"]),
    encoder("bert", "BertModel"),
    encoder("bert-classifier", "BertForSequenceClassification", num_labels=3),
    encoder("bert-masked-lm", "BertForMaskedLM"),
    encoder("roberta", "RobertaModel"),
    encoder("electra", "ElectraModel", embedding_size=16),
    encoder("mpnet", "MPNetModel"),
    encoder("albert", "AlbertModel", embedding_size=16),
    encoder("deberta-v2", "DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    encoder("modernbert", "ModernBertModel", local_attention=8, global_attn_every_n_layers=2,
            cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    encoder("squeezebert", "SqueezeBertModel", embedding_size=32),
    encoder("longformer", "LongformerModel", attention_window=4),
    encoder("fnet", "FNetModel"),
    encoder("distilbert", "DistilBertModel", {}, vocab_size=VOCABULARY, dim=32, hidden_dim=48,
            n_layers=2, n_heads=4, max_position_embeddings=64),
    encoder("funnel", "FunnelModel", {}, vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=32,
            n_head=4, d_head=8, d_inner=48, num_decoder_layers=1),
    encoder("xlnet", "XLNetModel", {}, vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4,
            d_inner=48),
    translator("t5", "T5", T5),
    translator("t5-gated", "T5", T5, feed_forward_proj="gated-gelu"),
    hf("t5-encoder", "text encoder", "T5EncoderModel", tokens, **T5, **ENDS),
    translator("longt5", "LongT5", T5, local_radius=3),
    translator("switch", "SwitchTransformers", T5, num_experts=4, num_sparse_encoder_layers=1,
               num_sparse_decoder_layers=1, num_decoder_layers=2),
    translator("bart", "Bart", forced_eos_token_id=None),
    translator("m2m100", "M2M100"),
    translator("marian", "MarianMTModel", forced_eos_token_id=None),
    translator("pegasus", "Pegasus", forced_eos_token_id=None),
]  # fmt: skip
