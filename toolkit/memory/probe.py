"""One training step watched storage by storage: which rows its peak is made of, and in which part of the step it is."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils._pytree import tree_leaves

from toolkit.memory.activations import STEP_ROWS, Lifetime, StorageTracker, classify, rows_at_peak
from toolkit.memory.ledger import Owners
from toolkit.prune.distributed import to_local


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
        self.rows: dict[str, int] = {}
        self.part = ""

    def __enter__(self) -> Self:
        for weight in self._name_owners().get("weights", []):
            if weight.itemsize > 2:  # others are cast by nobody
                self._tracker.stands(to_local(weight)).of_weights = True
                self._tracker.weight_numels.add(weight.numel())
        self._tracker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.__exit__(kind, error, trace)
        if error is None:
            self._add_up(self._name_owners())

    def _name(self, row: str, made: Lifetime | None) -> None:
        if made is not None:
            self._names.setdefault(id(made), row)

    def _name_owners(self) -> Owners:
        owners = self._owners()
        for row, tensors in owners.items():
            for tensor in map(to_local, tensors):
                self._name(row, self._tracker.stands(tensor))
        return owners

    def _add_up(self, owners: Owners) -> None:
        lives = classify(self._tracker, self._names, self._forward_end)
        self.rows, moment = rows_at_peak(lives, self._tracker.events, (*owners, *STEP_ROWS))
        self.part = "forward" if moment < self._forward_end else "backward" if moment < self._backward_end else "update"

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these tensors."""
        for tensor in tensors:
            self._tracker.leave_out(tensor)

    def name(self, row: str, *tensors: Any) -> None:
        """Say to which row tensors, or tuples of them, belong that are not there any more when the step ends."""
        for tensor in tree_leaves(tensors):
            self._name(row, self._tracker.of(tensor))

    def forward_done(self) -> None:
        """Backward begins."""
        self._forward_end = self._tracker.events

    def backward_done(self) -> None:
        """The update begins."""
        self._name_owners()  # gradients that an engine lets go of in its update
        self._backward_end = self._tracker.events
