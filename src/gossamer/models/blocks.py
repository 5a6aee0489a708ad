"""Finding the blocks of a model: the repeated units that calibration walks through in order."""

from __future__ import annotations

from torch import nn

from gossamer.core.matrix import is_prunable
from gossamer.models.families import is_block_list, is_head


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's blocks as (dotted prefix, module), in module order; [] when it has none.

    Structure decides: every outermost `nn.ModuleList` of at least two elements that share a class
    and contain prunable layers is a list of blocks (an encoder-decoder or a staged vision model
    has several). A list named as a known family's (`families.BLOCK_LISTS`) also counts with one
    block or with mixed classes. A model that is itself an `nn.Sequential` is walked child by
    child. Whether blocks can be run one after the other is not assumed: calibration probes it.
    """
    if isinstance(model, nn.Sequential):
        children = list(model.named_children())
        return children if sum(_holds_prunable(child) for _, child in children) > 1 else []
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
    if not len(blocks) or is_head(name):
        return False
    if any(isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in blocks):
        return False
    if not any(_holds_prunable(block) for block in blocks):
        return False
    if is_block_list(name):
        return True
    return len(blocks) > 1 and len({type(block) for block in blocks}) == 1


def _holds_prunable(module: nn.Module) -> bool:
    return any(is_prunable(child) for child in module.modules())
