"""Who owns which bytes: tensors counted by unique storage, each storage under the first row that claims it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.prune.distributed import to_local

Owners = dict[str, list[Tensor]]

# Rows that are not `optim.<state key>`: what pruning keeps in the optimizer's state.
_OPTIMIZER_ROWS = {
    "mask": "masks",
    "offsets": "offsets",
    "scores": "scores",
    "initial_weights": "initial_weights",
}


def is_optimizer_row(row: str) -> bool:
    """Whether a row is of the optimizer or its pruning: optim.*, masks, offsets, scores, initial_weights."""
    return row.startswith("optim.") or row in _OPTIMIZER_ROWS.values()


def storage_key(tensor: Tensor) -> int:
    """Which storage a tensor is a view of. (A fake tensor's has no address; this number each storage has.)"""
    return tensor.untyped_storage()._cdata


def find_owners(
    model: nn.Module,
    optimizer_state: Mapping[Tensor, Mapping[str, Any]],
    *,
    ema: nn.Module | None = None,
    in_buckets: bool = False,
    beside: Mapping[str, list[Tensor]] | None = None,
) -> Owners:
    """The tensors of each row: weights, buffers, gradients, optim.<key>, masks, offsets, scores, initial_weights,
    ddp_buckets, ema, and those that an engine has `beside` them.

    Between backward and the next step the gradients are there. `in_buckets` says that they are views of DDP's buckets,
    which stand from step to step: then they make up the row ddp_buckets.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    owners: Owners = {
        "weights": list(model.parameters()),
        "buffers": list(model.buffers()),
        "gradients": [] if in_buckets else gradients,
        "ddp_buckets": gradients if in_buckets else [],
    }
    states: Owners = {}
    for state in optimizer_state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                states.setdefault(_OPTIMIZER_ROWS.get(key, f"optim.{key}"), []).append(value)
    # In one order, for a loaded state has its keys in another; moments first, which own what a mask may be a view of.
    owners |= {row: states[row] for row in sorted(states, key=lambda row: (not row.startswith("optim."), row))}
    for row, tensors in (beside or {}).items():
        owners[row] = [*owners.get(row, []), *tensors]
    owners["ema"] = [] if ema is None else [*ema.parameters(), *ema.buffers()]
    return owners


def count_bytes(owners: Owners) -> dict[str, int]:
    """Bytes of each row; of DTensors those of this rank."""
    seen: set[int] = set()
    rows = dict.fromkeys(owners, 0)
    for row, tensors in owners.items():
        for tensor in map(to_local, tensors):
            if storage_key(tensor) not in seen:
                seen.add(storage_key(tensor))
                rows[row] += tensor.untyped_storage().nbytes()
    return rows


def optimizer_bytes(ledger: Mapping[str, int]) -> int:
    """What the optimizer and its pruning keep."""
    return sum(size for row, size in ledger.items() if is_optimizer_row(row))
