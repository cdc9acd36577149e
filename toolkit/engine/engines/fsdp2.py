"""FSDP2: parameters, gradients and states are DTensors, each rank holding rows of each."""

from collections.abc import Iterable

import torch
from torch import Tensor

from toolkit.engine.engines.ddp import Engine
from toolkit.memory.probe import StepProbe


class Fsdp2Engine(Engine):
    """See Engine."""

    name = "fsdp2"

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        with self._no_sync(last):  # FSDP2 decides in backward whether it sums over the ranks
            super().backward(loss, step, last=last, probe=probe)

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        own_zeros, weights = super().count_zeros(prunable)
        return int(self._world.sum(torch.tensor(own_zeros, dtype=torch.int64, device=self._world.device))), weights
