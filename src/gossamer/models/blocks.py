"""Finding the blocks of a model: the repeated units that calibration walks through in order."""

from __future__ import annotations

from torch import nn

from gossamer.core.matrix import is_prunable
from gossamer.models.families import is_head
from gossamer.models.weights import find_weights


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's blocks as (dotted prefix, module), in module order; [] when it has none.

    Blocks are pruned together and in order; they do not decide what is pruned. Structure decides:
    every outermost `nn.ModuleList` whose elements hold weights deeper inside is a list of blocks
    (an encoder-decoder or a staged vision model has several); of a list of lists, each list in it
    is one, whatever its length. A list of bare layers is none, nor is one named as an output head.
    A model that is itself an `nn.Sequential` is walked child by child. Whether blocks can be run
    one after the other is not assumed: calibration probes it.
    """
    if isinstance(model, nn.Sequential):
        children = list(model.named_children())
        return children if sum(bool(find_weights(child)) for _, child in children) > 1 else []
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(inside or ("\0",)):
            continue
        if _is_list_of_blocks(name, module):
            inside += (f"{name}.",)
            found += [(f"{name}.{index}", block) for index, block in enumerate(module)]
    return found


def _is_list_of_blocks(name: str, blocks: nn.ModuleList) -> bool:
    if is_head(name):
        return False
    if any(isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in blocks):
        return False
    return any(find_weights(block) and not is_prunable(block) for block in blocks)
