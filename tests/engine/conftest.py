"""Tiny random models of every family, with calibration data that fits them."""

import pytest
import torch
from torch import nn

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = ["llama", "gpt2", "opt", "bert", "vit", "cnn", "mlp"]


class PlainCNN(nn.Module):
    """Convolutions and a fully connected layer without any list of blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.deep(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.fc(x.mean(dim=(2, 3)))))


def build(family):
    """(model in training mode, four batches) from a fixed seed."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = [{"input_ids": torch.randint(0, 64, (2, 24))} for _ in range(4)]
    images = [torch.randn(2, 4, 10, 10) for _ in range(4)]
    match family:
        case "llama":
            config = t.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)
            return t.LlamaForCausalLM(config), words
        case "gpt2":
            sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
            return t.GPT2LMHeadModel(t.GPT2Config(**sizes)), words
        case "opt":
            config = t.OPTConfig(
                **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64
            )
            return t.OPTForCausalLM(config), words
        case "bert":
            config = t.BertConfig(**SMALL, intermediate_size=64)
            mask = torch.ones(2, 24, dtype=torch.int64)
            mask[1, 16:] = 0
            return t.BertModel(config), [{**batch, "attention_mask": mask} for batch in words]
        case "vit":
            config = t.ViTConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
            )
            pixels = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(4)]
            return t.ViTForImageClassification(config), pixels
        case "cnn":
            return PlainCNN(), images
        case "mlp":
            layers = [nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16)]
            return nn.Sequential(*layers), [torch.randn(20, 16) for _ in range(4)]
    raise AssertionError(family)


@pytest.fixture
def tiny():
    """build(family) -> (model, batches)"""
    return build


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
