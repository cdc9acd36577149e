"""FSDP2: parameters, gradients and states are DTensors, each rank holding rows of each."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from toolkit.engine.engines.ddp import Engine, exchange, hold, part_of, scatter
from toolkit.engine.shard import Shard
from toolkit.memory.probe import StepProbe
from toolkit.prune.distributed import to_local


class Fsdp2Engine(Engine):
    """See Engine."""

    name = "fsdp2"

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        with self._no_sync(last):  # FSDP2 decides in backward whether it sums over the ranks
            super().backward(loss, step, last=last, probe=probe)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self._world.sum(values)

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        own_zeros, weights = super().count_zeros(prunable)
        return int(self._world.sum(torch.tensor(own_zeros, dtype=torch.int64, device=self._world.device))), weights

    def held(self) -> nn.Module:
        return hold(map(to_local, self.module.state_dict().values()))

    def averages(self, ema: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        parts = dict(zip(self.module.state_dict(), ema.parameters(), strict=True))
        return ((parameter, parts[name]) for name, parameter in self.module.named_parameters())

    @contextlib.contextmanager
    def evaluated(self, ema: nn.Module | None) -> Iterator[nn.Module]:
        if ema is not None:
            self._exchange(ema)
        yield self.module
        if ema is not None:
            self._exchange(ema)

    def _exchange(self, ema: nn.Module) -> None:
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # whole weights that an evaluation leaves behind are not these
        exchange(self.held(), ema)

    @property
    def offloads(self) -> bool:
        return any(to_local(weight).device.type != self._world.device.type for weight in self.module.parameters())

    def weights(self, ema: nn.Module | None = None) -> Iterator[tuple[str, Tensor | Shard]]:
        own = self.module.state_dict()
        for (name, tensor), part in zip(own.items(), (self.held() if ema is None else ema).parameters(), strict=True):
            yield name, part_of(part.detach(), tensor)

    def load_average(self, ema: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for (name, tensor), part in zip(self.module.state_dict().items(), ema.parameters(), strict=True):
            part.copy_(to_local(scatter(weights[name], tensor)))
