"""What differs between engines: how a step is made, and where a whole weight or moment is found.

One contract, four files: `ddp` (one rank, or DDP), `fused` (DDP's with the update inside backward), `fsdp2`, `zero`
(DeepSpeed's ZeRO-1, 2 and 3). Whatever the engine, a checkpoint is made of whole parameter-shaped tensors by name,
brought together one at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.memory.probe import StepProbe

__all__ = ["Engine", "States"]

States = Mapping[str, Mapping[str, Tensor]]  # parameter name -> state key -> whole tensor


class Engine(Protocol):
    """An engine's way to train `module`.

    A step is `zero_grad`, then `forward` and `backward` for each micro-batch, then `update`. From `count_zeros` on all
    methods are collectives; whole tensors are on CPU, on rank 0 at least.
    """

    name: str  # ddp, fsdp2, zero1, zero2 or zero3
    model: nn.Module  # what is trained: the module as the engine wraps it, perhaps compiled
    module: nn.Module  # the module itself
    inner_optimizer: Optimizer  # ours or timm's; the engine may show it slices instead of parameters
    scaler: Any  # of fp16's gradients, or None
    clip_grad: float | None
    clip_mode: str

    def zero_grad(self) -> None:
        """Begin a step: forget the gradients of the last one."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""

    def forward(self, images: Tensor, *, last: bool) -> Tensor:
        """Outputs of one micro-batch, at least float32; `last` says whether it is the step's last."""

    def updates_in_backward(self, step: int) -> bool:
        """Whether the last `backward` of this step makes the update too, so that a bad loss is refused before it."""

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        """Gradients of one micro-batch; with the last one the ranks' are brought together."""

    def update(self, step: int, want_norm: bool) -> Tensor | None:
        """Clip, and let the optimizer step. Returns the gradients' norm before clipping where it was taken."""

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """(zeros, weights) over all ranks."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every parameter and buffer."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by name. Raises RuntimeError where names or shapes differ."""

    @property
    def optimizer_state(self) -> Mapping[Tensor, dict[str, Any]]:
        """What the optimizer keeps for each parameter, as this rank has it."""

    def optimizer_states(self) -> Iterator[tuple[str, str, Any]]:
        """Parameter name, state key and whole dense tensor of the optimizer's state; numbers as they are."""

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        """Take whole dense states by name, and the groups' settings."""
