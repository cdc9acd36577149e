"""Who owns which bytes: tensors counted by unique storage, each storage under the first row that claims it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OPTIMIZER_ROWS", "optimizer_bytes", "row_of_state", "tensor_ledger"]

# Rows that are not `optim.<state key>`: what pruning keeps in the optimizer's state.
OPTIMIZER_ROWS = {
    "mask": "masks",
    "keep": "masks",
    "offsets": "offsets",
    "scores": "scores",
    "initial_weights": "initial_weights",
}


def row_of_state(key: str) -> str:
    """Ledger row of a key in an optimizer's state."""
    return OPTIMIZER_ROWS.get(key, f"optim.{key}")


class _Counter:
    """Adds up storages that no earlier row has claimed."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.rows: dict[str, int] = {}

    def add(self, row: str, tensors: Iterable[Tensor]) -> None:
        self.rows.setdefault(row, 0)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.rows[row] += storage.nbytes()


def tensor_ledger(
    model: nn.Module,
    optimizer_state: Mapping[Tensor, Mapping[str, Any]],
    *,
    ema: nn.Module | None = None,
    separate_buckets: bool = False,
) -> dict[str, int]:
    """Bytes by row: weights, buffers, gradients, optim.<key>, masks, offsets, scores, initial_weights, ddp_buckets,
    ema.

    Take it after backward, while gradients are there. `separate_buckets` says that DDP keeps buckets beside the
    gradients; with `gradient_as_bucket_view` the gradients are views of them and the row is 0.
    """
    counter = _Counter()
    counter.add("weights", model.parameters())
    counter.add("buffers", model.buffers())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    counter.add("gradients", gradients)
    for state in optimizer_state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                counter.add(row_of_state(key), [value])
    counter.rows["ddp_buckets"] = sum(grad.nbytes for grad in gradients) if separate_buckets else 0
    counter.add("ema", () if ema is None else [*ema.parameters(), *ema.buffers()])
    return counter.rows


def optimizer_bytes(ledger: Mapping[str, int]) -> int:
    """What the optimizer and its pruning keep: the optim.* rows, masks, offsets, scores and initial weights."""
    owned = set(OPTIMIZER_ROWS.values())
    return sum(size for row, size in ledger.items() if row in owned or row.startswith("optim."))
