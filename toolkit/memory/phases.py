"""The phases of a run, and the allocator's peaks within each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.memory.allocator import PEAKS, DeviceReading, read_device, reset_peaks
from toolkit.prune.schedule import Schedule

# In this order; build, evaluation and checkpoint are not made of training steps.
PHASES = ("build", "first_step", "warm_up", "dense", "ramp", "final", "evaluation", "checkpoint")


@dataclass(frozen=True)
class Phase:
    """Optimizer steps `first` to `last`, one of which is probed for the ledger of its peak."""

    name: str
    first: int
    last: int
    probed: int


def plan_phases(total_steps: int, warmup_steps: int, schedule: Schedule) -> list[Phase]:
    """The phases of a run's steps: first step, learning-rate warm-up, dense, pruning ramp, final sparsity.

    The ramp ends a warm-up that it runs into. Probed is a phase's second step, from the third of the run on (DDP makes
    its buckets anew in the second), and of the ramp the first that prunes.
    """
    end = min(schedule.end_step, total_steps) if schedule.enabled and schedule.end_step is not None else total_steps
    begin = min(schedule.begin_step, total_steps) if schedule.enabled else total_steps
    borders = [
        ("first_step", 1),
        ("warm_up", min(warmup_steps, begin)),
        ("dense", begin),
        ("ramp", end),
        ("final", total_steps),
    ]
    phases, done = [], 0
    for name, last in borders:
        if last > done:
            probed = min(max(done + 2, 3), last) if done else 1
            if name == "ramp":
                probed = next((step for step in range(done + 1, last + 1) if schedule.is_update_step(step)), last)
            phases.append(Phase(name, done + 1, last, probed))
            done = last
    return phases


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    """The phase a step belongs to."""
    return next((phase for phase in phases if phase.first <= step <= phase.last), phases[-1])


class PeakWindows:
    """The one owner of peak resets: the allocator's peaks of each phase, highest of all its stretches, and of the life.

    Without an accelerator there is nothing to read, and every figure is None.
    """

    def __init__(self, device: torch.device, read: Callable[[torch.device], DeviceReading] = read_device) -> None:
        self._device = device
        self._read = read
        self.phase = PHASES[0]
        self.peaks: dict[str, dict[str, int]] = {}
        reset_peaks(device)

    def enter(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        if phase != self.phase:
            self.close_window()
            self.phase = phase

    def close_window(self) -> dict[str, int]:
        """Take the peaks since the last reset into the phase's, and begin anew. Returns them; empty without a GPU."""
        reading = self._read(self._device)
        found = {key: value for key in PEAKS if (value := reading[key]) is not None}
        self._merge(self.phase, found)
        reset_peaks(self._device)
        return found

    def _merge(self, phase: str, found: dict[str, int]) -> None:
        kept = self.peaks.setdefault(phase, {})
        for key, value in found.items():
            kept[key] = max(value, kept.get(key, 0))

    def figures(self) -> dict[str, dict[str, int | None]]:
        """Peaks by phase in order, those of the window at hand included, and `life`, the highest of all."""
        self.close_window()
        every: dict[str, dict[str, int | None]] = {
            phase: {key: self.peaks[phase].get(key) for key in PEAKS} for phase in PHASES if phase in self.peaks
        }
        every["life"] = {
            key: max((kept[key] for kept in self.peaks.values() if key in kept), default=None) for key in PEAKS
        }
        return every

    def load(self, peaks: dict[str, dict[str, Any]]) -> None:
        """Take in the peaks of a run that this one goes on from."""
        for phase, found in peaks.items():
            self._merge(phase, found)
