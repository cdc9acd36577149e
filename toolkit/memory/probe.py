"""One training step watched storage by storage: which rows its peak is made of, beside what stands between steps."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from toolkit.memory.activations import StorageTracker, classify, fullest_moment

__all__ = ["STEP_ROWS", "StepProbe"]

# Rows that live within a step only; the others of the ledger stand between steps.
STEP_ROWS = ("gradients", "input", "activations", "weight_casts", "workspace")


class StepProbe:
    """Watches one step as a context; `forward_done` marks the border to backward, `rows` tells what the peak held.

    Tracking costs some microseconds an operator, so a run probes one step a phase.
    """

    def __init__(self, model: nn.Module, standing: Iterable[Tensor]) -> None:
        self._model = model
        self._tracker = StorageTracker()
        self._tracker.forget(iter([*model.parameters(), *model.buffers(), *standing]))
        self._inputs: list[Tensor] = []
        self._forward_end = 0
        self.rows: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._tracker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.__exit__(kind, error, trace)
        if error is None:
            self.rows = self._rows_at_peak()
        self._inputs = []

    def _rows_at_peak(self) -> dict[str, int]:
        tracker = self._tracker
        gradients = [tracker.of(p.grad) for p in self._model.parameters() if p.grad is not None]
        names = classify(tracker, gradients, [tracker.of(tensor) for tensor in self._inputs], self._forward_end)
        end = tracker.events
        lives = [(one.born, end if one.died is None else one.died, one.size_bytes) for one in tracker.lifetimes]
        moment = fullest_moment(lives, end)
        rows = dict.fromkeys(STEP_ROWS, 0)
        weights = {parameter.numel() for parameter in self._model.parameters()}
        for one, name in zip(tracker.lifetimes, names, strict=True):
            if one.born <= moment and (one.died is None or one.died > moment):
                half = one.dtype in (torch.bfloat16, torch.float16)
                cast = name == "activations" and half and one.size_bytes // 2 in weights
                rows["weight_casts" if cast else name] += one.size_bytes
        return rows

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these tensors."""
        for tensor in tensors:
            made = self._tracker.of(tensor)
            if made is not None:
                made.size_bytes = 0

    def inputs(self, *tensors: Tensor) -> None:
        """Name the tensors of the batch."""
        self._inputs += tensors

    def forward_done(self) -> None:
        """Backward begins."""
        self._forward_end = self._tracker.events
