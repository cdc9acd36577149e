"""The contract of an engine, and the plainest: one rank, or DDP."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.dist import World
from toolkit.engine.clip import Part, clip, total_norm
from toolkit.engine.shard import Shard
from toolkit.memory.ledger import Owners
from toolkit.memory.probe import StepProbe
from toolkit.prune.distributed import first_weight, to_local
from toolkit.prune.mask import count_zeros
from toolkit.prune.packing import dense_state
from toolkit.prune.spans import whole_range

States = Mapping[str, Mapping[str, Tensor]]  # parameter name -> state key -> whole tensor


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Name of each parameter by id."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def part_of(values: Tensor, like: Tensor) -> Tensor | Shard:
    """What this rank holds of a tensor laid out as `like`: its part of one that is cut, else all of it."""
    return Shard(like.shape, first_weight(like), values.reshape(-1)) if hasattr(like, "to_local") else values


def scatter(value: Any, like: Any) -> Any:
    """A whole tensor laid out as the DTensor `like` of its shape; every rank has the whole, so nothing is sent.

    Anything else as it is.
    """
    if not hasattr(like, "to_local") or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def hold(tensors: Iterable[Tensor]) -> nn.ParameterList:
    """Tensors as a module, which shares their memory."""
    return nn.ParameterList(nn.Parameter(tensor.detach(), requires_grad=False) for tensor in tensors)


@torch.no_grad()
def exchange(some: nn.Module, others: nn.Module) -> None:
    """Swap the values of two modules' parameters."""
    for one, other in zip(some.parameters(), others.parameters(), strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def _part_of(parameter: Tensor) -> Part:
    gradient = None if parameter.grad is None else to_local(parameter.grad)
    return Part(to_local(parameter.detach()), gradient, first_weight(parameter), parameter.shape)


class Engine:
    """An engine's way to train `module`; as it stands here that of one rank or DDP, where every rank has everything.

    A step is `zero_grad`, then `forward` and `backward` for each micro-batch, then `update`. From `count_zeros` on
    methods are collectives. Of what is saved each rank gives its part, as it lies there, and waits for nobody: a Shard
    of a tensor that is cut, or all of it, of which rank 0's counts.

    name: ddp, fsdp2, zero1, zero2 or zero3.
    model: what is trained: the module as the engine wraps it, perhaps compiled. `optimizer` is wrapped likewise.
    inner_optimizer: ours or timm's; the engine may show it slices instead of parameters.
    scaler: of fp16's gradients, or None.
    is_compiled: whether the forward pass is torch.compile's.

    `amp_dtype` is the dtype of forward passes, None for float32; with `clip_mode` norm, value or agc gradients are
    clipped at `clip_grad`, None for not at all.
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
        self.is_compiled = hasattr(model, "_orig_mod") or bool(getattr(model, "is_compiled", False))
        self._amp_dtype = amp_dtype

    def zero_grad(self) -> None:
        """Begin a step: forget the gradients of the last one."""
        self._optimizer.zero_grad()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self._world.device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None)

    def _no_sync(self, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self.model)

    def forward(self, images: Tensor, *, last: bool) -> Tensor:
        """Outputs of one micro-batch, at least float32; `last` says whether it is the step's last."""
        with self._no_sync(last), self.autocast():  # DDP decides in forward whether backward will sum over the ranks
            output: Tensor = self.model(images)
        return output.float() if output.dtype.itemsize < 4 else output

    def updates_in_backward(self, step: int) -> bool:
        """Whether the last `backward` of this step makes the update too, so that a bad loss is refused before it."""
        return False

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        """Gradients of one micro-batch; with the last one the ranks' are brought together."""
        self._accelerator.backward(loss)

    def update(self, step: int, want_norm: bool) -> Tensor | None:
        """Clip, and let the optimizer step. Returns the gradients' norm before clipping where it was taken."""
        norm = self._clip() if want_norm or self.clip_grad is not None else None
        self._optimizer.step()
        return norm

    def _clip(self) -> Tensor:
        """The gradients' norm, before they are clipped where that was asked for."""
        parts = self._parts()
        if self.scaler is not None:
            self._unscale(parts)
        norm = total_norm(parts, self._world.device, self._over_ranks)
        if self.clip_grad is not None and (self.scaler is None or norm.isfinite()):  # else the step is left out
            clip(parts, norm, self.clip_grad, self.clip_mode, self._over_ranks)
        return norm

    def _unscale(self, parts: list[Part]) -> None:
        """Divide gradients by fp16's scale."""
        self.scaler.unscale_(self.inner_optimizer)

    def _parts(self) -> list[Part]:
        """What this rank holds of each parameter's gradient, in the module's order."""
        return [_part_of(parameter) for parameter in self.module.parameters()]

    def _over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks of which each holds a share of the gradients: here each holds them all."""
        return values

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """(zeros, weights) over all ranks."""
        weights = [parameter for _, parameter in prunable]
        return count_zeros(map(to_local, weights)), sum(weight.numel() for weight in weights)

    def held(self) -> nn.Module:
        """What ModelEmaV3 is to average: the module, or of a module in parts this rank's, in one order."""
        return self.module

    def averages(self, ema: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """What the optimizer is shown, and its average among what ModelEmaV3 made of `held`."""
        return zip(self.module.parameters(), ema.parameters(), strict=True)

    @contextlib.contextmanager
    def evaluated(self, ema: nn.Module | None) -> Iterator[nn.Module]:
        """The module with the averages in it where there are some; leave it before anything is saved."""
        yield self.module if ema is None else ema

    def whole(self, part: Tensor | Shard) -> Tensor:
        """Bring a tensor together from every rank's part: bits are added where others have none."""
        if isinstance(part, Tensor):
            return part
        whole = torch.zeros(part.shape.numel(), dtype=part.values.dtype, device=self._world.device)
        whole[part.start : part.start + part.values.numel()] = part.values
        self._world.sum(whole.view(torch.uint8))
        return whole.view(part.shape)

    def weights(self, ema: nn.Module | None = None) -> Iterator[tuple[str, Tensor | Shard]]:
        """Name and this rank's part of every parameter and buffer, or of their averages."""
        for name, tensor in (self.module if ema is None else ema).state_dict().items():
            yield name, tensor.detach()

    def load_average(self, ema: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Take whole averages by name."""
        ema.load_state_dict(dict(weights))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by name. Raises RuntimeError where names or shapes differ."""
        own = self.module.state_dict()
        self.module.load_state_dict({name: scatter(tensor, own.get(name)) for name, tensor in weights.items()})

    @property
    def optimizer_state(self) -> Mapping[Tensor, dict[str, Any]]:
        """What the optimizer keeps for each parameter, as this rank has it."""
        optimizer: Any = self.inner_optimizer
        return getattr(optimizer, "_base_optimizer", optimizer).state  # timm's Lookahead has a state apart, unused

    @property
    def offloads(self) -> bool:
        """Whether a part of what is trained lies on the host of an accelerator."""
        return False

    def beside(self) -> Owners:
        """What this rank holds, by ledger row, beside the module, its gradients and the optimizer's state."""
        return {}

    def optimizer_states(self) -> Iterator[tuple[str, str, Any]]:
        """Parameter name, state key and this rank's part of the dense optimizer state; numbers as they are."""
        names = parameter_names(self.module)
        for parameter, state in self.optimizer_state.items():
            tensors = {key: to_local(value) for key, value in state.items() if torch.is_tensor(value)}
            for key in state.keys() - tensors.keys():
                yield names[id(parameter)], key, state[key]
            for key, value in dense_state(to_local(parameter), tensors, whole_range(parameter)).items():
                shaped = value.ndim > 0 and value.shape == to_local(parameter).shape
                yield names[id(parameter)], key, part_of(value, parameter) if shaped else value

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        """Take whole dense states by name, and the groups' settings."""
        names, own, numbers = parameter_names(self.module), self.inner_optimizer.param_groups, itertools.count()
        numbered = [  # torch knows parameters by their number
            {**settings, "params": list(itertools.islice(numbers, len(group["params"])))}
            for group, settings in zip(own, groups, strict=True)
        ]
        state = {}
        for number, parameter in enumerate(parameter for group in own for parameter in group["params"]):
            saved = states.get(names[id(parameter)])
            if saved:
                state[number] = {key: scatter(value, parameter) for key, value in saved.items()}
        self.inner_optimizer.load_state_dict({"state": state, "param_groups": numbered})
