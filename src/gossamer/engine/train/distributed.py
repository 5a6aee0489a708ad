"""Sparse training on several ranks: one support, whatever holds the weights.

Supports are whole on every rank, also where FSDP2 shards the weights: a method then decides from
the same matrices as on one rank, by the same code, and a checkpoint fits any number of ranks. The
price is two bytes a weight and rank (the mask, and what was ever in it), and weights gathered when
a support changes; between changes each rank masks its own shard and nothing is sent but one flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError
from gossamer.core.result import unwrap


class Ranks:
    """The processes that train one model together; every method here is called by all of them.

    groups: one process group for each axis of their mesh; none for a model on one rank.
    """

    def __init__(self, groups: Sequence[Any] = ()) -> None:
        self.groups = tuple(group for group in groups if group.size() > 1)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, so that all raise an error or none does."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of a whole number over all ranks."""
        if not self.groups:
            return number
        sent = torch.tensor([number], device=self._device())
        for group in self.groups:
            torch.distributed.all_reduce(sent, torch.distributed.ReduceOp.MAX, group=group)
        return int(sent)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its mean over ranks, in place; what is equal already stays."""
        for tensor in tensors:
            for group in self.groups:
                torch.distributed.all_reduce(tensor, group=group)
                tensor.div_(group.size())

    def agree(self, generator: torch.Generator) -> None:
        """Every generator continues as that of the first rank."""
        if self.groups:
            state = generator.get_state().to(self._device())
            generator.set_state(self._from_first(state).cpu())

    def check_equal(self, masks: Mapping[str, Tensor]) -> None:
        """Raise UsageError, on all ranks, unless all hold the masks of the first."""
        if not self.groups:
            return
        flat = torch.cat([mask.reshape(-1) for mask in masks.values()]).to(torch.uint8)
        if self.any(not torch.equal(self._from_first(flat.clone()), flat)):
            raise UsageError(
                "the ranks would choose different supports, so their weights are no longer equal; "
                "start them equal and let every step average its gradients over all ranks"
            )

    def _from_first(self, tensor: Tensor) -> Tensor:
        for group in self.groups:
            torch.distributed.broadcast(tensor, group=group, group_src=0)
        return tensor

    def _device(self) -> torch.device:
        backend = torch.distributed.get_backend(self.groups[0])
        return torch.device("cuda" if backend == "nccl" else "cpu")


def unwrapped(model: nn.Module, group: Any = None) -> tuple[nn.Module, Ranks]:
    """The model without the wrappers that rename its layers, and the ranks that train it.

    Seen through: torch.compile, DataParallel, DistributedDataParallel. Recognised: the DTensors
    of FSDP2. group: for a model whose gradients are averaged by other means. Raises UsageError for
    FSDP1, which keeps no layer's weight whole or split by rows.
    """
    groups = [] if group is None else [group]
    inner = unwrap(model)
    outer: Any = model if isinstance(model, nn.Module) else model.model
    while outer is not inner:
        if isinstance(outer, nn.parallel.DistributedDataParallel):
            groups = [outer.process_group]
        compiled = outer._modules.get("_orig_mod")
        outer = outer.module if compiled is None else compiled
    model = inner
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]  # an evaluation leaves the root gathered
        if type(module).__name__ != "FullyShardedDataParallel":
            continue
        raise UsageError(
            "FullyShardedDataParallel flattens weights, which leaves no layer to mask; shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    sharded = [p for p in model.parameters() if is_sharded(p)]
    if sharded:
        mesh: Any = sharded[0].device_mesh  # type: ignore[attr-defined]
        groups = mesh.get_all_groups()
    return model, Ranks(groups)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of the tensor (a DTensor)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The detached tensor, gathered from all ranks where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of the tensor, sharing memory with it."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the part that this rank holds of `like`, without communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    part = distribute_tensor(
        tensor.detach().contiguous(), place.device_mesh, place.placements, src_data_rank=None
    )
    return part.to_local()
