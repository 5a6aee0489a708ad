"""Families of plain torch modules, and of timm and diffusers where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from families import VOCABULARY, Batch, Family, bare, floats
from torch import Tensor, nn
from torch.nn import functional as F


def torch_net(
    name: str, build: Callable[[], nn.Module], batches: Callable[[], list[Batch]]
) -> Family:
    """A network written with torch.nn alone."""
    return Family(name, "torch.nn", build, batches)


class Pair(nn.Module):
    """nn.Transformer from sources to targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(32, 4, 2, 2, 48, batch_first=True)
        self.out = nn.Linear(32, 8)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.net(source, target))


class Attention(nn.Module):
    """Self-attention with a residual, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Encoder(nn.Module):
    """Embedded tokens through nn.TransformerEncoder, with padding masked."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0))


class Tagger(nn.Module):
    """A recurrent network in both directions over tokens, a label for each."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.recurrent = kind(16, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.tags = nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tags(self.recurrent(self.embed(ids))[0])


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip connection between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = F.relu(self.first(x))
        far = self.up(self.middle(F.relu(self.down(near))))
        return self.last(torch.cat([near, far], 1))


class Heads(nn.Module):
    """One body, three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.outputs = nn.ModuleList(nn.Linear(32, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.body(x)
        return tuple(output(x) for output in self.outputs)


class Shared(nn.Module):
    """One layer called three times, and known under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.again = self.step

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(F.relu(self.step(F.relu(self.step(F.relu(self.first(x))))))))


class Idle(nn.Module):
    """A layer that the forward never calls, and one that only odd batches call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.unused, self.rare = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(F.relu(self.rare(x)) if len(x) % 2 else x)


class Gate(nn.Module):
    """A perceptron that reads its layer's weight for the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)).to(self.down.weight.dtype))


class Scaled(nn.Linear):
    """A linear layer whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def block(inside: int, out: int, **own: Any) -> list[nn.Module]:
    """A 3x3 convolution with its norm."""
    return [nn.Conv2d(inside, out, 3, padding=1, **own), nn.BatchNorm2d(out), nn.ReLU()]


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )


def weight_normed() -> nn.Module:
    """A perceptron with one reparametrised layer."""
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[2])
    return net


def pooled(*layers: nn.Module, width: int) -> nn.Module:
    """Convolutions, the mean over pixels, a linear layer."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 8))


def pairs() -> list[Batch]:
    """Sources and targets of different lengths."""
    return [{"source": torch.randn(3, 9, 32), "target": torch.randn(3, 7, 32)}]


def timm_net(name: str, build: Callable[[Any], nn.Module], side: int = 32) -> Family:
    """A model of timm, made by `build(timm.models)`."""

    def make() -> nn.Module:
        import no_torchvision

        no_torchvision.stand_in()
        import timm

        return build(timm.models)

    return Family(f"timm-{name}", "timm", make, floats(4, side, side, rows=(2, 1)), needs=("timm",))


PICTURE: dict[str, Any] = {"in_chans": 4, "num_classes": 8}
LITE: dict[str, Any] = {**PICTURE, "pad_type": "same", "pretrained": False}


def norm_free(models: Any) -> nn.Module:
    """Scaled standardised convolutions, without norms."""
    shape = models.nfnet.NfCfg(
        depths=(1, 1), channels=(32, 64), stem_type="3x3", stem_chs=16, num_features=64,
        reg=False, attn_layer=None,
    )  # fmt: skip
    return models.nfnet.NormFreeNet(shape, **PICTURE)


def diffusion_unet() -> nn.Module:
    """A small UNet2DModel of diffusers."""
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def conditional_unet() -> nn.Module:
    """A small UNet2DConditionModel of diffusers."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=8, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    """A small AutoencoderKL of diffusers."""
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=4, out_channels=4, latent_channels=4, block_out_channels=(16, 32),
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def noised() -> list[Batch]:
    """Pictures and the step of the noise."""
    return [{"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([10, 500])}]


def prompted() -> list[Batch]:
    """The same with the states of a prompt."""
    return [{**batch, "encoder_hidden_states": torch.randn(2, 5, 16)} for batch in noised()]


def diffuser(
    name: str, build: Callable[[], nn.Module], batches: Callable[[], list[Batch]]
) -> Family:
    """A model of diffusers."""
    return Family(name, "diffusers", build, batches, needs=("diffusers",))


FAMILIES = [
    torch_net("mlp", mlp, floats(32, rows=(40, 3))),
    torch_net("mlp-weight-norm", weight_normed, floats(32, rows=(40, 3))),
    torch_net("multi-task", Heads, floats(32, rows=(40, 3))),
    torch_net("shared-layer", Shared, floats(32, rows=(40, 3))),
    torch_net("idle-layers", Idle, floats(32, rows=(40, 3))),
    torch_net("weight-reader", Gate, floats(32, rows=(40, 3))),
    torch_net("own-linear", lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), Scaled(64, 8)),
              floats(32, rows=(40, 3))),
    torch_net("attention", Attention, floats(9, 32)),
    torch_net("transformer-encoder", lambda: Encoder(False), bare),
    torch_net("transformer-encoder-pre-norm", lambda: Encoder(True), bare),
    torch_net("transformer", Pair, pairs),
    torch_net("lstm-tagger", lambda: Tagger(nn.LSTM), bare),
    torch_net("gru-tagger", lambda: Tagger(nn.GRU), bare),
    torch_net("conv1d", lambda: nn.Sequential(
        nn.Conv1d(8, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 14, 8)), floats(8, 16)),
    torch_net("conv2d", lambda: pooled(*block(4, 16), *block(16, 32), width=32), floats(4, 16, 16)),
    torch_net("conv3d", lambda: nn.Sequential(
        nn.Conv3d(4, 8, 3), nn.ReLU(), nn.Conv3d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 64, 8)),
        floats(4, 8, 8, 8)),
    torch_net("grouped-conv", lambda: pooled(
        *block(4, 16), *block(16, 16, groups=4), width=16), floats(4, 16, 16)),
    torch_net("depthwise-conv", lambda: pooled(
        *block(4, 16), *block(16, 16, groups=16), nn.Conv2d(16, 32, 1), nn.ReLU6(), width=32),
        floats(4, 16, 16)),
    torch_net("padded-conv", lambda: pooled(
        nn.Conv2d(4, 16, 3, padding="same"), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"), nn.ReLU(), width=32),
        floats(4, 16, 16)),
    torch_net("unet", UNet, floats(4, 16, 16)),
    timm_net("resnet", lambda m: m.ResNet(
        m.resnet.BasicBlock, (1, 1, 1, 1), channels=(16, 16, 32, 32), stem_width=16, **PICTURE)),
    timm_net("resnetv2-bit", lambda m: m.resnetv2.ResNetV2(
        (1, 1), (32, 64), stem_chs=32, stem_type="fixed",
        norm_layer=partial(m.resnetv2.GroupNormAct, num_groups=4), **PICTURE)),
    timm_net("nf-resnet", norm_free),
    timm_net("efficientnet-lite", lambda m: m.efficientnet._gen_efficientnet_lite(
        "tf_efficientnet_lite0", 0.1, 0.2, **LITE), 64),
    timm_net("mobilenetv3", lambda m: m.mobilenetv3._gen_mobilenet_v3(
        "tf_mobilenetv3_small_075", 0.2, **LITE), 64),
    timm_net("densenet", lambda m: m.DenseNet(8, (2, 2), **PICTURE)),
    timm_net("convnext", lambda m: m.ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), **PICTURE)),
    timm_net("vit", lambda m: m.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4,
                                                  **PICTURE)),
    timm_net("swin", lambda m: m.SwinTransformer(
        32, 4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, **PICTURE)),
    timm_net("mixer", lambda m: m.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32,
                                           **PICTURE)),
    timm_net("levit", lambda m: m.Levit(
        img_size=64, embed_dim=(16, 32), key_dim=8, depth=(1, 1), num_heads=(2, 4), **PICTURE), 64),
    diffuser("diffusers-unet", diffusion_unet, noised),
    diffuser("diffusers-conditional-unet", conditional_unet, prompted),
    diffuser("diffusers-vae", autoencoder, floats(4, 16, 16, rows=(2,))),
]  # fmt: skip
