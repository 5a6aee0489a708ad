"""Families that see, hear, or read series of numbers."""

from __future__ import annotations

from typing import Any

import torch
from families import PAD, VOCABULARY, Batch, Family, floats, hf, images

VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "num_channels": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SOUND: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "num_channels": 4, "embed_dim": 16, "depths": [2, 2],
    "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip


def vision(name: str, model: str, base: dict[str, Any] = VIT, side: int = 32, **own: Any) -> Family:
    """A vision model of transformers on pictures of four channels, or of `num_channels`."""
    config = {**base, **own}
    return hf(name, "vision", model, images(side, config.get("num_channels", 4)), **config)


def sound(name: str, model: str, **own: Any) -> Family:
    """A model on raw sound."""
    return hf(name, "speech", model, floats(320, name="input_values"), **{**SOUND, **own})


def text_and_image() -> list[Batch]:
    """Two captions and two pictures."""
    ids = torch.randint(3, VOCABULARY, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    ids[:, 4] = 2
    return [{"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 4, 32, 32)}]


def image_in_text() -> list[Batch]:
    """A prompt with the places of one picture's 16 patches in it."""
    ids = torch.randint(3, VOCABULARY - 1, (2, 24))
    ids[:, 2:18] = VOCABULARY - 1
    mask = torch.ones_like(ids)
    return [{"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 4, 32, 32)}]


def features(width: int, length: int) -> list[Batch]:
    """Spectrograms with their decoder's tokens: channels first."""
    ids = torch.randint(3, VOCABULARY, (2, 6))
    return [{"input_features": torch.randn(2, width, length), "decoder_input_ids": ids}]


def speech_frames() -> list[Batch]:
    """Spectrograms with frames first, one of them padded."""
    ids = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 20:] = 0
    x = torch.randn(2, 32, 16)
    return [{"input_features": x, "attention_mask": mask, "decoder_input_ids": ids}]


SPEECH_PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "max_target_positions": 32,
}  # fmt: skip

FAMILIES = [
    vision("vit", "ViTModel"),
    vision("vit-classifier", "ViTForImageClassification"),
    vision("deit", "DeiTModel"),
    vision("beit", "BeitModel"),
    vision("dinov2", "Dinov2Model", mlp_ratio=2),
    vision("swin", "SwinModel", SWIN),
    vision("swinv2", "Swinv2Model", SWIN),
    vision("convnext", "ConvNextModel", {}, num_channels=4, depths=[1, 1], hidden_sizes=[16, 32],
           num_stages=2),
    vision("resnet", "ResNetModel", {}, num_channels=3, embedding_size=16, hidden_sizes=[16, 32],
           depths=[1, 1], layer_type="basic"),
    vision("bit", "BitModel", {}, num_channels=4, embedding_size=16, hidden_sizes=[32, 64],
           depths=[1, 1], num_groups=4),
    vision("regnet", "RegNetModel", {}, num_channels=4, embedding_size=16, hidden_sizes=[16, 32],
           depths=[1, 1], groups_width=8),
    vision("mobilenet-v2", "MobileNetV2Model", {}, side=64, num_channels=4, depth_multiplier=0.25,
           image_size=64),
    vision("segformer", "SegformerModel", {}, num_channels=4, hidden_sizes=[16, 32],
           num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], num_attention_heads=[2, 4],
           mlp_ratios=[2, 2], patch_sizes=[7, 3], strides=[4, 2]),
    vision("poolformer", "PoolFormerModel", {}, num_channels=4, hidden_sizes=[16, 32],
           num_encoder_blocks=2, depths=[1, 1], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]),
    vision("yolos", "YolosModel", image_size=[32, 32], num_detection_tokens=4),
    sound("wav2vec2", "Wav2Vec2Model"),
    sound("hubert", "HubertModel"),
    sound("wavlm", "WavLMModel", num_buckets=16),
    hf("audio-spectrogram", "speech", "ASTModel", floats(32, 16, name="input_values"),
       hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
       patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16),
    hf("whisper", "speech", "WhisperForConditionalGeneration", lambda: features(16, 32), True,
       **SPEECH_PAIR, num_mel_bins=16, max_source_positions=16, begin_suppress_tokens=None,
       suppress_tokens=None),
    hf("speech2text", "speech", "Speech2TextForConditionalGeneration", speech_frames, True,
       **SPEECH_PAIR, input_feat_per_channel=16, conv_channels=32, num_conv_layers=2,
       max_source_positions=64),
    hf("clip", "multimodal", "CLIPModel", text_and_image, projection_dim=16,
       text_config=TEXT, vision_config=VIT),
    hf("siglip", "multimodal", "SiglipModel", text_and_image, text_config=TEXT, vision_config=VIT),
    hf("llava", "multimodal", "LlavaForConditionalGeneration", image_in_text, True,
       text_config={**TEXT, "model_type": "llama"},
       vision_config={**VIT, "model_type": "clip_vision_model"}, image_token_id=VOCABULARY - 1,
       vision_feature_layer=-1),
    hf("patchtst", "time series", "PatchTSTModel", floats(32, 3, name="past_values"),
       num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=32,
       num_attention_heads=4, num_hidden_layers=2, ffn_dim=48),
    hf("patchtsmixer", "time series", "PatchTSMixerModel", floats(32, 4, name="past_values"),
       num_input_channels=4, context_length=32, patch_length=8, patch_stride=8, d_model=32,
       num_layers=2),
]  # fmt: skip
