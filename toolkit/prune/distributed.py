"""A parameter split over ranks: this rank's part of it, and the group of ranks that hold the rest.

FSDP2's parameters are DTensors of the whole shape; everything of ours works on the local part, lower ranks holding
lower indices, and only the choice of what to prune looks over all of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (a view), or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def memory_order(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the axes that have any: of an axis of size 1 torch leaves open what its stride is."""
    return tuple(step for step, size in zip(stride, shape, strict=True) if size > 1)


def in_layout_of(part: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the part's shape in the part's memory layout, where it is: itself, or a copy where it must be."""
    ours, theirs = tensor.stride(), part.stride()
    if ours == theirs or memory_order(tensor.shape, ours) == memory_order(part.shape, theirs):
        return tensor
    return torch.empty_like(part, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def local_gradient(parameter: Tensor, part: Tensor) -> Tensor:
    """The gradient of this rank's part of a parameter, in the memory layout of the part."""
    assert parameter.grad is not None
    return in_layout_of(part, to_local(parameter.grad))


def to_dtensor(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part as a tensor of the parameter's kind: a DTensor of the whole shape, or the part itself."""
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    return DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def first_weight(parameter: Tensor) -> int:
    """Place of this rank's first weight in the whole parameter, in memory order: above 0 where a DTensor is cut."""
    if not hasattr(parameter, "to_local"):
        return 0
    from torch.distributed.tensor import Shard

    sharded: Any = parameter
    for axis, placement in enumerate(sharded.placements):
        if isinstance(placement, Shard) and placement.dim == 0 and parameter.ndim:
            ranks, rank = sharded.device_mesh.size(axis), sharded.device_mesh.get_local_rank(axis)
            rows = min(-(-parameter.shape[0] // ranks) * rank, parameter.shape[0])  # as torch cuts: the last ones less
            return rows * (parameter.numel() // max(1, parameter.shape[0]))
    return 0


def shard_group(parameters: Iterable[Tensor]) -> ProcessGroup | None:
    """The ranks over which DTensor parameters are sharded, None where none is. Raises ValueError for more than one."""
    for parameter in parameters:
        if hasattr(parameter, "to_local"):
            sharded: Any = parameter
            axes = [axis for axis, placement in enumerate(sharded.placements) if placement.is_shard()]
            if len(axes) > 1:
                raise ValueError(f"a parameter sharded over {len(axes)} mesh axes cannot be pruned; shard over one")
            if axes:
                return sharded.device_mesh.get_group(axes[0])
    return None


def sum_over(group: ProcessGroup | None, counts: Sequence[int] | Tensor, device: torch.device) -> list[int]:
    """Elementwise sum over the ranks of a group; the counts themselves where there is none."""
    if group is None and not isinstance(counts, Tensor):
        return list(counts)
    total = counts if isinstance(counts, Tensor) else torch.tensor(counts, dtype=torch.int64, device=device)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.tolist()


def read_numbers(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of 0-d tensors of one dtype: one wait for each device they lie on."""
    values: list[Any] = [None] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        for place, value in zip(places, torch.stack([tensors[place] for place in places]).tolist(), strict=True):
            values[place] = value
    return values


def gather_over(group: ProcessGroup | None, values: Tensor) -> Tensor:
    """Every rank's values [n], one row a rank: [ranks, n]; a row of its own where there is no group."""
    if group is None:
        return values.unsqueeze(0)
    size = torch.distributed.get_world_size(group)
    every = values.new_empty(size * values.numel())
    torch.distributed.all_gather_into_tensor(every, values, group=group)
    return every.view(size, -1)
