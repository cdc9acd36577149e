"""FSDP2: parameters, gradients and states are DTensors, each rank holding rows of each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.dist import World
from toolkit.engine.engines import States
from toolkit.engine.engines.ddp import PlainSharding, indexed_state, parameter_names
from toolkit.prune.distributed import to_dtensor, to_local
from toolkit.prune.packing import dense_state

__all__ = ["Fsdp2Sharding"]


def _full(tensor: Tensor) -> Tensor:
    sharded: Any = tensor
    return (sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def _share(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a DTensor laid out as `like`; every rank has the whole, so nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(full.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


class Fsdp2Sharding(PlainSharding):
    """See Sharding; backward and update go together as they do with DDP."""

    name = "fsdp2"

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, world: World) -> None:
        super().__init__(accelerator, model, optimizer)
        self._world = world

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        weights = [parameter for _, parameter in prunable]
        zeros = sum(int((to_local(weight) == 0).sum()) for weight in weights)
        total = self._world.sum(torch.tensor(zeros, dtype=torch.int64, device=self._world.device))
        return int(total), sum(weight.numel() for weight in weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._model.state_dict().items():
            yield name, _full(tensor)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self._model.state_dict()
        shared = {
            name: _share(full, own[name]) if hasattr(own.get(name), "to_local") else full
            for name, full in weights.items()
        }
        self._model.load_state_dict(shared)

    def optimizer_states(self) -> Iterator[tuple[str, str, Tensor]]:
        names = parameter_names(self._model)
        for parameter, state in self._optimizer.state.items():
            tensors = {key: to_local(value) for key, value in state.items() if torch.is_tensor(value)}
            for key, value in dense_state(to_local(parameter), tensors).items():
                shaped = value.shape == to_local(parameter).shape and value.ndim > 0
                yield names[id(parameter)], key, _full(to_dtensor(value, parameter) if shaped else value)

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        parameters = dict(self._model.named_parameters())
        shared = {
            name: {
                key: _share(value, parameters[name]) if value.shape == parameters[name].shape and value.ndim else value
                for key, value in state.items()
            }
            for name, state in states.items()
        }
        self._optimizer.load_state_dict(indexed_state(self._optimizer, parameter_names(self._model), shared, groups))
