"""One rank's memory over a run: a timeline, ledgers, peaks by phase; kept on disk while the run goes on.

Each rank keeps its record in memory_ranks/ of the run folder. At the end one gather makes the report of all ranks from
the records in memory; where a rank has died and no gather can be, the others' files make it.
"""

import contextlib
import csv
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.dist import World
from toolkit.files import csv_text, write_atomically, write_json
from toolkit.memory.allocator import read_device, read_host, release_blas_workspaces
from toolkit.memory.device_load import LOAD, find_device_load
from toolkit.memory.device_use import find_device_use
from toolkit.memory.ledger import Owners, count_bytes, optimizer_bytes
from toolkit.memory.phases import PeakWindows, Phase, phase_of
from toolkit.memory.probe import StepProbe
from toolkit.memory.sampler import MemorySampler

RANKS_FOLDER = "memory_ranks"
TIMELINE_COLUMNS = (
    "rank",
    "time_s",
    "step",
    "phase",
    "ledger_bytes",
    "optimizer_bytes",
    "rss_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "device_used_bytes",
    *(f"device_{kind}" for kind in LOAD),
    "alloc_retries",
)


class MemoryLog:
    """One rank's memory. Made before anything else of a run, so that its first window is the building of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._begin = time.monotonic()
        self.owners: Callable[[], Owners] = dict
        self._plan: Sequence[Phase] = ()
        self._file: Path | None = None
        self.timeline: list[dict[str, Any]] = []
        self.peak: dict[str, int] = {}
        self.end: dict[str, int] = {}
        self.peak_step = 0
        self.resumed_after: list[int] = []  # the last sampled step before each resume
        self.phases: dict[str, dict[str, Any]] = {}
        self.windows = PeakWindows(world.device)
        self._sampler = MemorySampler(find_device_use(world.device), find_device_load(world.device))

    def begin(self, owners: Callable[[], Owners], plan: Sequence[Phase], folder: Path) -> None:
        """Everything is built: whose tensors to count, the phases to come, and where to keep the record."""
        self.owners, self._plan = owners, plan
        self._file = folder / RANKS_FOLDER / f"rank{self._world.rank:05d}.json"

    def enter_step(self, step: int) -> None:
        """Optimizer step `step` begins, by the count that the phases go by."""
        self.windows.enter(phase_of(self._plan, step).name)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A stretch that is no training step: evaluation or checkpoint."""
        before = self.windows.phase
        self.windows.enter(phase)
        yield
        self.windows.enter(before)

    @contextlib.contextmanager
    def probe(self, step: int) -> Iterator[StepProbe | None]:
        """Watch optimizer step `step` storage by storage if its phase is to be; one made anew is watched anew."""
        phase = phase_of(self._plan, step)
        if step != phase.probed:
            yield None
            return
        self.windows.close_window()
        probe = StepProbe(self.owners)
        with probe:
            yield probe
        peaks = self.windows.close_window()
        self.phases[phase.name] = {
            "step": step,
            "part": probe.part,
            "rows": probe.rows,
            "peaks": peaks,
            "blas_workspaces_bytes": release_blas_workspaces(self._world.device),
        }

    def sample(self, step: int) -> dict[str, int]:
        """Record the present ledger and readings; returns the ledger. Call while gradients are there."""
        ledger = count_bytes(self.owners())
        device, recent = read_device(self._world.device), self._sampler.recent()
        self.end = ledger
        if sum(ledger.values()) > sum(self.peak.values()):
            self.peak, self.peak_step = ledger, step
        row = {
            "rank": self._world.rank,
            "time_s": round(time.monotonic() - self._begin, 3),
            "step": step,
            "phase": self.windows.phase,
            "ledger_bytes": sum(ledger.values()),
            "optimizer_bytes": optimizer_bytes(ledger),
            "rss_bytes": recent["rss_bytes"] or read_host()["rss_bytes"],
            "allocated_bytes": device["allocated_bytes"],
            "reserved_bytes": device["reserved_bytes"],
            "device_used_bytes": recent["device_used_bytes"] or device["device_used_bytes"],
            **{
                f"device_{kind}": None if mean is None else round(mean, 1)
                for kind, mean in self._sampler.recent_load().items()
            },
            "alloc_retries": device["alloc_retries"],
        }
        self.timeline.append(row)
        if self._file is not None:
            table = self._file.with_suffix(".csv")
            if len(self.timeline) == 1 or not table.exists():  # anew, or resumed
                write_atomically(table, csv_text(TIMELINE_COLUMNS, self.timeline))
            else:
                with open(table, "a", newline="") as file:
                    csv.DictWriter(file, TIMELINE_COLUMNS).writerow(row)
            write_json(self._file, self.record())
        return ledger

    def close_record(self, reason: str) -> None:
        """Leave this rank's last word on disk, for a report that no gather can make."""
        if self._file is not None:
            write_json(self._file, {**self.record(), "ended": reason})

    def release_cache(self) -> tuple[int, int] | None:
        """Give the allocator's free blocks back to the device; reserved bytes before and after, None without a GPU."""
        if self._world.device.type != "cuda":
            return None
        before = torch.cuda.memory_reserved(self._world.device)
        torch.cuda.empty_cache()
        return before, torch.cuda.memory_reserved(self._world.device)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must carry so that a resumed run still knows its peak."""
        return {
            "timeline": self.timeline,
            "peak": self.peak,
            "end": self.end,
            "peak_step": self.peak_step,
            "resumed_after": self.resumed_after,
            "elapsed_s": time.monotonic() - self._begin,
            "phases": self.phases,
            "windows": self.windows.peaks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.timeline, self.peak, self.end = state["timeline"], state["peak"], state["end"]
        self.peak_step, self.phases = state["peak_step"], state["phases"]
        self.resumed_after = [*state.get("resumed_after", []), self.timeline[-1]["step"] if self.timeline else 0]
        self.windows.load(state["windows"])
        self._begin = time.monotonic() - state["elapsed_s"]

    def record(self) -> dict[str, Any]:
        """This rank's part of the report."""
        place, use, load = self._world.device, self._sampler.use, self._sampler.load
        on_gpu = place.type == "cuda"
        return {
            "rank": self._world.rank,
            "local_rank": self._world.local_rank,
            "host_name": socket.gethostname(),
            "unit": "bytes",
            "device_type": place.type,
            "num_ranks": self._world.num_ranks,
            "last_step": self.timeline[-1]["step"] if self.timeline else 0,
            "resumed_after_steps": self.resumed_after,
            "device": {key: value for key, value in read_device(place).items() if "peak" not in key},
            "device_uuid": str(getattr(torch.cuda.get_device_properties(place), "uuid", place)) if on_gpu else None,
            "device_used_source": use.name if use else "none",
            "device_used_failed": use.failed if use else {},
            "device_load_source": load.name if load else "none",
            "device_load_failed": load.failed if load else {},
            **self._sampler.figures(),
            "host": read_host(),
            "peaks": self.windows.figures(),
            "ledger_peak": self.peak,
            "ledger_peak_step": self.peak_step,
            "ledger_end": self.end,
            "phases": self.phases,
        }

    def close(self) -> None:
        """End the sampling."""
        self._sampler.stop()
