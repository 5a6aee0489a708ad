"""An ordinary dense checkpoint with zeros in it, for every reader that does not know Gossamer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.matrix import is_transposed
from gossamer.io.atomic import new_folder
from gossamer.io.load import load
from gossamer.io.manifest import NAME, read_manifest
from gossamer.io.save import distinct, write_config, write_tensors
from gossamer.io.skeleton import outline, read_config
from gossamer.nn import BitmapLinear, NMLinear, PackedConv2d, QuantizedLinear


def export(
    folder: str | Path, out: str | Path, *, dense: bool = True, overwrite: bool = False
) -> Path:
    """Turn a folder that `save` wrote into an ordinary masked one that plain transformers loads.

    dense: must be True; other forms do not exist yet. Raises FormatError, UsageError like `load`
    and `save`. Memory: the dense weights.
    """
    if not dense:
        raise UsageError("only dense=True can be exported")
    source = Path(folder)
    if not (source / NAME).exists():
        raise UsageError(f"{source} holds no {NAME}; it is already an ordinary folder")
    read_manifest(source)
    model = load(source)
    shapes = outline(read_config(source))
    tensors = _dense_state(model, shapes)
    with new_folder(Path(out), overwrite) as place:
        write_config(model, place, None)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.is_symlink() and _belongs_to_tokenizer(path.name):
                (place / path.name).write_bytes(path.read_bytes())
        write_tensors(tensors, place)
    return Path(out)


def _dense_state(model: nn.Module, shapes: nn.Module) -> dict[str, Tensor]:
    kinds = BitmapLinear | NMLinear | PackedConv2d | QuantizedLinear
    packed = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    hidden = {f"{name}.{part}" for name, layer in packed.items() for part in layer._buffers}
    state = {key: value for key, value in distinct(model).items() if key not in hidden}
    for name, layer in packed.items():
        matrix = layer.to_matrix()
        if isinstance(layer, PackedConv2d):
            shaped = matrix.reshape(matrix.shape[0], *layer.window.kernel, -1)
            state[f"{name}.weight"] = shaped.permute(0, 3, 1, 2).contiguous()
            continue
        turned = is_transposed(shapes.get_submodule(name))
        state[f"{name}.weight"] = matrix.t().contiguous() if turned else matrix
    return state


def _belongs_to_tokenizer(name: str) -> bool:
    return "token" in name or name in ("vocab.json", "merges.txt", "vocab.txt")
