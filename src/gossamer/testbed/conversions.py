"""From what packages hold to model folders, and from these to models.

A function `..._to_folder(source, folder)` fills the folder from unpacked files; the others read one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError
from gossamer.core.files import write_safetensors
from gossamer.testbed.efficientnet import EfficientNetLite0, renamed

WEIGHTS = "model.safetensors"
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""Position embeddings in the ViT's file: of the class token, of the 37 x 37 patches."""


def gguf_to_folder(source: Path, folder: Path) -> None:
    """The only GGUF file as an ordinary bfloat16 folder.

    A model read from GGUF refuses to be saved, so its weights move to a new one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _only(source, "*.gguf")
    place, local = str(file.parent), {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(place, **local)
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **local)
    config = type(read.config).from_dict(
        {key: v for key, v in read.config.to_dict().items() if key != "quantization_config"}
    )
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pth_to_folder(source: Path, folder: Path) -> None:
    """EfficientNet-lite0's state dict under the names of `EfficientNetLite0`."""
    state = torch.load(_only(source, "*.pth"), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(renamed(state))
    write_safetensors(model.state_dict(), folder / WEIGHTS, {"format": "pt"})


def onnx_to_folder(source: Path, folder: Path) -> None:
    """The backbone of the ViT in an ONNX file, as a folder of a Dinov2Model."""
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(_only(source, "*.onnx")).graph
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518,
        mlp_ratio=4,
    )  # fmt: skip
    model = Dinov2Model(config)
    held = _backbone(graph)
    state = {name: held[_older(name)] for name in model.state_dict()}
    model.load_state_dict(state)
    model.save_pretrained(folder)


def _backbone(graph: Any) -> dict[str, Tensor]:
    """The backbone's tensors under the names that older versions of transformers gave them.

    Biases, norms and embeddings keep these names in the file. The matrix of a linear layer is found
    by the scope of its node, and lies transposed. The position embeddings were split by the
    exporter into those of the class token and of the patches, without a name.
    """
    from onnx import numpy_helper

    arrays = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    held = {name.removeprefix("backbone."): x for name, x in arrays.items()}
    for node in graph.node:
        scope = re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name)
        if scope and node.input[1] in arrays:
            held[scope[1].replace("/", ".") + ".weight"] = arrays[node.input[1]].T.contiguous()
    positions = [held[name] for name in POSITIONS]
    held["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    held["embeddings.mask_token"] = torch.zeros(1, 384)  # of pretraining alone, not in the file
    return held


def _older(name: str) -> str:
    for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"),
                     ("v_proj", "attention.value"), ("o_proj", "output.dense")):  # fmt: skip
        name = name.replace(new, old)
    return name


def efficientnet(folder: Path) -> nn.Module:
    """EfficientNet-lite0 for ImageNet: images (n, 3, 224, 224), as (value - 127) / 128."""
    from safetensors.torch import load_file

    model = EfficientNetLite0()
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model


def causal(folder: Path) -> nn.Module:
    """A causal language model of transformers."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model


def encoder(folder: Path) -> nn.Module:
    """An encoder of transformers, without a head."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return model


def _only(source: Path, pattern: str) -> Path:
    found = sorted(source.rglob(pattern))
    if len(found) != 1:
        raise FormatError(f"the package holds {len(found)} files {pattern} where one is expected")
    return found[0]
