"""One rank, or DDP: every rank has everything."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.dist import World
from toolkit.engine.engines import States
from toolkit.memory.probe import StepProbe
from toolkit.prune.distributed import to_dtensor, to_local
from toolkit.prune.packing import dense_state


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Name of each parameter by id."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _gather(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, or the tensor itself; on CPU."""
    sharded: Any = tensor
    return (sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def _scatter(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor laid out as the DTensor `like`; every rank has the whole, so nothing is sent. Else as it is."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class DdpEngine:
    """See Engine. `model` and `optimizer` are Accelerate's, `module` and `inner_optimizer` what they wrap.

    `amp_dtype` is the dtype of forward passes, None for float32; with `clip_mode` norm, value or agc gradients are
    clipped at `clip_grad`, None for not at all. Tensors may be DTensors: FSDP2's engine is this one in all but a step.
    """

    name = "ddp"

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        module: nn.Module,
        optimizer: Any,
        inner_optimizer: Optimizer,
        world: World,
        amp_dtype: torch.dtype | None = None,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
    ) -> None:
        self._accelerator, self._optimizer, self._world = accelerator, optimizer, world
        self.model, self.module, self.inner_optimizer = model, module, inner_optimizer
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        self.scaler = accelerator.scaler
        self._amp_dtype = amp_dtype

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def autocast(self) -> AbstractContextManager[Any]:
        if self._amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._world.device.type, dtype=self._amp_dtype)

    def _no_sync(self, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self.model)

    def forward(self, images: Tensor, *, last: bool) -> Tensor:
        with self._no_sync(last), self.autocast():  # DDP decides in forward whether backward will sum over the ranks
            output: Tensor = self.model(images)
        return output.float() if output.dtype.itemsize < 4 else output

    def updates_in_backward(self, step: int) -> bool:
        return False

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        self._accelerator.backward(loss)

    def update(self, step: int, want_norm: bool) -> Tensor | None:
        norm = self._clip() if want_norm or self.clip_grad is not None else None
        self._optimizer.step()
        return norm

    def _clip(self) -> Tensor:
        """The gradients' norm, before they are clipped where that was asked for."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        if self.clip_grad is not None and self.clip_mode == "norm":
            return self._accelerator.clip_grad_norm_(parameters, self.clip_grad)
        self._accelerator.unscale_gradients()
        norm: Any = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        if self.clip_grad is not None:
            if self.clip_mode == "agc":  # timm leaves the classifier out
                parameters = list(model_parameters(self.module, exclude_head=True))
            dispatch_clip_grad(parameters, self.clip_grad, mode=self.clip_mode)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards, of which each rank has some

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        weights = [parameter for _, parameter in prunable]
        return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.module.state_dict().items():
            yield name, _gather(tensor)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self.module.state_dict()
        self.module.load_state_dict({name: _scatter(tensor, own.get(name)) for name, tensor in weights.items()})

    @property
    def optimizer_state(self) -> Mapping[Tensor, dict[str, Any]]:
        optimizer: Any = self.inner_optimizer
        return getattr(optimizer, "_base_optimizer", optimizer).state  # timm's Lookahead has a state apart, unused

    def optimizer_states(self) -> Iterator[tuple[str, str, Any]]:
        names = parameter_names(self.module)
        for parameter, state in self.optimizer_state.items():
            tensors = {key: to_local(value) for key, value in state.items() if torch.is_tensor(value)}
            for key in state.keys() - tensors.keys():
                yield names[id(parameter)], key, state[key]
            for key, value in dense_state(to_local(parameter), tensors).items():
                shaped = value.ndim > 0 and value.shape == to_local(parameter).shape
                yield names[id(parameter)], key, _gather(to_dtensor(value, parameter) if shaped else value)

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        names, optimizer = parameter_names(self.module), self.inner_optimizer
        state, numbered, position = {}, [], 0  # torch knows parameters by their number
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            first, position = position, position + len(group["params"])
            numbered.append({**settings, "params": list(range(first, position))})
            for number, parameter in enumerate(group["params"], first):
                if saved := states.get(names[id(parameter)]):
                    shaped = {key for key, value in saved.items() if getattr(value, "shape", ()) == parameter.shape}
                    state[number] = {
                        key: _scatter(value, parameter) if key in shaped and value.ndim else value
                        for key, value in saved.items()
                    }
        optimizer.load_state_dict({"state": state, "param_groups": numbered})
