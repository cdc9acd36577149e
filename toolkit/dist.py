"""Rank facts and the few collectives, under one vocabulary; everything is the identity where there is one rank."""

import gc
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks. All collectives must be called by all ranks in the same order."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @classmethod
    def detect(cls, device: torch.device) -> "World":
        """Read the facts from torch.distributed; one rank where it is not initialised."""
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), device)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and log lines."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, in place on `values` where there are several."""
        if self.num_ranks > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Largest element over the ranks, in place on `values` where there are several."""
        if self.num_ranks > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def begin_max(self, values: Tensor) -> dist.Work | None:
        """As `max`, without waiting: `values` hold it when the result, where there is one, has been waited for."""
        return dist.all_reduce(values, op=dist.ReduceOp.MAX, async_op=True) if self.num_ranks > 1 else None

    def gather(self, item: T) -> list[T]:
        """Every rank's picklable item, by rank, on every rank."""
        if self.num_ranks == 1:
            return [item]
        items: list[T | None] = [None] * self.num_ranks
        dist.all_gather_object(items, item)
        return items  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.num_ranks > 1:
            dist.barrier()


def leave_group() -> None:
    """Close the process group once all ranks are here; nothing that uses it may be alive any more.

    Left to the interpreter's exit, the group's threads now and then abort a rank whose work is done ("terminate called
    without an active exception": 4 of 16 two-rank runs on CPU; with this call 0 of 30).
    """
    gc.collect()  # the last references to DDP, which holds the group, are cycles
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
