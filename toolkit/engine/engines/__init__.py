"""What differs between engines: how backward and update go together, and where a whole weight or moment is found.

Three files, one contract: `plain` (one rank, or DDP), `fsdp2`, `zero` (DeepSpeed's ZeRO-1, 2 and 3). Whatever the
engine, a checkpoint is made of whole parameter-shaped tensors by name, brought together one at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

__all__ = ["Sharding", "States"]

States = Mapping[str, Mapping[str, Tensor]]  # parameter name -> state key -> whole tensor


class Sharding(Protocol):
    """An engine's way. All methods but `backward` are collectives; whole tensors are on CPU, on rank 0 at least."""

    name: str
    updates_in_backward: bool  # whether `backward` of the last micro-batch makes the update too

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch of a step; `last` says whether the update follows."""

    def grad_norm(self) -> Tensor | None:
        """The gradients' norm before clipping, where the engine clips by itself."""

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """(zeros, weights) over all ranks."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every parameter and buffer."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole tensors by name. Raises RuntimeError where names or shapes differ."""

    def optimizer_states(self) -> Iterator[tuple[str, str, Tensor]]:
        """Parameter name, state key and whole dense tensor of the optimizer's state; scalars as they are."""

    def load_optimizer_states(self, states: States, groups: list[dict[str, object]]) -> None:
        """Take whole dense states by name, and the groups' settings."""
