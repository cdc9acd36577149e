"""One training step watched storage by storage: which rows its peak is made of, and in which part of the step it is."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from toolkit.memory.activations import Lifetime, StorageTracker, classify, fullest_moment
from toolkit.memory.ledger import Owners
from toolkit.prune.distributed import to_local

# Rows that live within a step only; the others of the ledger stand between steps.
STEP_ROWS = ("gradients", "input", "activations", "weight_casts", "workspace")


class StepProbe:
    """Watches one step as a context; `owners()` names what stands before it and what it leaves.

    Afterwards `rows` are the bytes by row when most was alive, `part` says when: forward, backward or update. Every
    storage is in one row, so they sum to all that was alive. Tracking costs some microseconds an operator, so a run
    probes one step a phase.
    """

    def __init__(self, owners: Callable[[], Owners]) -> None:
        self._owners = owners
        self._tracker = StorageTracker()
        self._names: dict[int, str] = {}  # of lifetimes, by id; the tracker keeps them alive
        self._forward_end = self._backward_end = 0
        self._weights: set[int] = set()
        self._standing: dict[str, None] = {}  # rows of owners, in their order
        self.rows: dict[str, int] = {}
        self.part = ""

    def __enter__(self) -> Self:
        owners = self._owners()
        self._weights = {weight.numel() for weight in owners.get("weights", [])}
        for row, tensors in owners.items():
            for tensor in tensors:
                self._name(row, self._tracker.stands(to_local(tensor)))
        self._tracker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.__exit__(kind, error, trace)
        if error is None:
            self._name_what_is_left()
            self._add_up()

    def _name(self, row: str, made: Lifetime | None) -> None:
        if made is not None:
            self._names.setdefault(id(made), row)

    def _name_what_is_left(self) -> None:
        for row, tensors in self._owners().items():
            self._standing[row] = None
            for tensor in map(to_local, tensors):
                made = self._tracker.of(tensor)
                self._name(row, self._tracker.stands(tensor) if made is None else made)

    def _add_up(self) -> None:
        tracker = self._tracker
        end = tracker.events
        lives = [(one.born, end if one.died is None else one.died, one.size_bytes) for one in tracker.lifetimes]
        moment = fullest_moment(lives, end)
        rows = dict.fromkeys((*self._standing, *STEP_ROWS), 0)
        for one, name in zip(tracker.lifetimes, classify(tracker, self._names, self._forward_end), strict=True):
            if one.born <= moment and (one.died is None or one.died > moment):
                half = one.dtype in (torch.bfloat16, torch.float16)
                cast = name == "activations" and half and one.size_bytes // 2 in self._weights
                row = "weight_casts" if cast else name
                rows[row] = rows.get(row, 0) + one.size_bytes
        self.rows = rows
        self.part = "forward" if moment < self._forward_end else "backward" if moment < self._backward_end else "update"

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these tensors."""
        for tensor in tensors:
            made = self._tracker.of(tensor)
            if made is not None:
                made.size_bytes = 0

    def name(self, row: str, *tensors: Tensor) -> None:
        """Say to which row tensors belong that are not there any more when the step ends."""
        for tensor in tensors:
            self._name(row, self._tracker.of(tensor))

    def forward_done(self) -> None:
        """Backward begins."""
        self._forward_end = self._tracker.events

    def backward_done(self) -> None:
        """The update begins."""
        self._backward_end = self._tracker.events
