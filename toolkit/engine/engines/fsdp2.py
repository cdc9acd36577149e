"""FSDP2: parameters, gradients and states are DTensors, each rank holding rows of each."""

from collections.abc import Iterable

import torch
from torch import Tensor

from toolkit.engine.engines.ddp import DdpEngine
from toolkit.memory.probe import StepProbe
from toolkit.prune.distributed import to_local


class Fsdp2Engine(DdpEngine):
    """See Engine."""

    name = "fsdp2"

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        with self._no_sync(last):  # FSDP2 decides in backward whether it sums over the ranks
            super().backward(loss, step, last=last, probe=probe)

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        weights = [parameter for _, parameter in prunable]
        zeros = sum(int((to_local(weight) == 0).sum()) for weight in weights)
        total = self._world.sum(torch.tensor(zeros, dtype=torch.int64, device=self._world.device))
        return int(total), sum(weight.numel() for weight in weights)
