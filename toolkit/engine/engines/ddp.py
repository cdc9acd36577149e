"""One rank, or DDP: every rank has everything."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.engine.engines import States
from toolkit.prune.packing import dense_state

__all__ = ["PlainSharding", "indexed_state", "parameter_names"]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Name of each parameter by id."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def indexed_state(
    optimizer: Optimizer, names: Mapping[int, str], states: States, groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `Optimizer.load_state_dict` takes: states by position, groups with positions for parameters."""
    state, shaped, position = {}, [], 0
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        positions = range(position, position + len(group["params"]))
        shaped.append({**settings, "params": list(positions)})
        for index, parameter in zip(positions, group["params"], strict=True):
            if names[id(parameter)] in states:
                state[index] = dict(states[names[id(parameter)]])
        position += len(group["params"])
    return {"state": state, "param_groups": shaped}


class PlainSharding:
    """See Sharding."""

    name = "ddp"
    updates_in_backward = False

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._accelerator.backward(loss)

    def grad_norm(self) -> Tensor | None:
        return None

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        weights = [parameter for _, parameter in prunable]
        return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._model.state_dict().items():
            yield name, tensor.detach().cpu()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(dict(weights))

    def optimizer_states(self) -> Iterator[tuple[str, str, Tensor]]:
        names = parameter_names(self._model)
        for parameter, state in self._optimizer.state.items():
            tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
            for key, value in dense_state(parameter, tensors).items():
                yield names[id(parameter)], key, value.detach().cpu()

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        self._optimizer.load_state_dict(indexed_state(self._optimizer, parameter_names(self._model), states, groups))
