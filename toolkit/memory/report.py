"""One memory report for a run: each rank records, one gather brings the records together, rank 0 writes them.

On a machine without an accelerator the kind is `host-standin`: device fields are null, and the tensor-byte ledger is
the primary figure. It is exact on any device; host RSS is shown beside it and is not GPU memory.
"""

import contextlib
import csv
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.dist import World
from toolkit.memory.device import find_device_use
from toolkit.memory.ledger import optimizer_bytes
from toolkit.memory.probe import StepProbe
from toolkit.memory.sampler import DeviceSampler
from toolkit.memory.sources import read_device, read_host, reset_peaks

__all__ = ["SCHEMA", "TIMELINE_COLUMNS", "MemoryLog", "merge_ranks", "phase_ledgers", "reduce_ranks"]

SCHEMA = "memory-report/1"
STANDIN_NOTE = "NO GPU: tensor-byte ledger and host RSS; not comparable with GPU memory"
TIMELINE_COLUMNS = (
    "rank", "time_s", "step", "ledger_bytes", "optimizer_bytes", "rss_bytes", "allocated_bytes", "reserved_bytes",
    "device_used_bytes",
)  # fmt: skip


class MemoryLog:
    """One rank's memory over a run: a timeline, the ledger where its total was highest, and the ledger at the end."""

    def __init__(self, take_ledger: Callable[[], dict[str, int]], world: World) -> None:
        self._take_ledger = take_ledger
        self._world = world
        self._begin = time.monotonic()
        self.timeline: list[dict[str, Any]] = []
        self.peak: dict[str, int] = {}
        self.end: dict[str, int] = {}
        self.peak_step = 0
        self.phases: dict[str, dict[str, Any]] = {}
        self._life_peak_bytes = 0  # of the allocator, over what a phase's own window has reset
        reset_peaks(world.device)
        self._sampler = DeviceSampler(find_device_use(world.device))

    def sample(self, step: int) -> dict[str, int]:
        """Record the present ledger and readings; returns the ledger. Call while gradients are there."""
        ledger = self._take_ledger()
        device, host = read_device(self._world.device), read_host()
        self.end = ledger
        if sum(ledger.values()) > sum(self.peak.values()):
            self.peak, self.peak_step = ledger, step
        self.timeline.append(
            {
                "rank": self._world.rank,
                "time_s": round(time.monotonic() - self._begin, 3),
                "step": step,
                "ledger_bytes": sum(ledger.values()),
                "optimizer_bytes": optimizer_bytes(ledger),
                "rss_bytes": host["rss_bytes"],
                "allocated_bytes": device["allocated_bytes"],
                "reserved_bytes": device["reserved_bytes"],
                "device_used_bytes": device["device_used_bytes"],
            }
        )
        return ledger

    @contextlib.contextmanager
    def phase(self, name: str, step: int, probe: StepProbe) -> Iterator[StepProbe]:
        """Watch one step for the ledger of its peak. Call at the start of a step, with no gradients of one's own."""
        before = read_device(self._world.device)["allocated_peak_bytes"] or 0
        self._life_peak_bytes = max(self._life_peak_bytes, before)
        reset_peaks(self._world.device)
        with probe:
            yield probe
        ledger = self._take_ledger()
        if self._world.num_ranks > 1:  # gradients are views of DDP's buckets, which stand from step to step
            ledger["ddp_buckets"] = ledger.pop("gradients")
        rows = {**ledger, **probe.rows}
        peak = read_device(self._world.device)["allocated_peak_bytes"]
        self.phases[name] = {"step": step, "rows": rows, "allocated_peak_bytes": peak}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must carry so that a resumed run still knows its peak."""
        elapsed_s = time.monotonic() - self._begin
        return {"timeline": self.timeline, "peak": self.peak, "end": self.end, "peak_step": self.peak_step,
                "elapsed_s": elapsed_s, "phases": self.phases, "life_peak_bytes": self._life_peak_bytes}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.timeline, self.peak, self.end = state["timeline"], state["peak"], state["end"]
        self.peak_step = state["peak_step"]
        self.phases, self._life_peak_bytes = state["phases"], state["life_peak_bytes"]
        self._begin = time.monotonic() - state["elapsed_s"]

    def record(self) -> dict[str, Any]:
        """This rank's part of the report."""
        device, host = read_device(self._world.device), read_host()
        if device["allocated_peak_bytes"] is not None:
            device["allocated_peak_bytes"] = max(device["allocated_peak_bytes"], self._life_peak_bytes)
        return {
            "rank": self._world.rank,
            "local_rank": self._world.local_rank,
            "host_name": socket.gethostname(),
            "unit": "bytes",
            "device_type": self._world.device.type,
            "num_ranks": self._world.num_ranks,
            "device": {key: value for key, value in device.items() if key != "device_used_bytes"},
            "device_uuid": _device_uuid(self._world.device),
            **self._device_use(),
            "host": host,
            "ledger_peak": self.peak,
            "ledger_end": self.end,
            "phases": self.phases,
        }

    def _device_use(self) -> dict[str, Any]:
        """Whole-device use over this process's life, and where the figures come from."""
        use = self._sampler.use
        return {
            "device_used_source": use.name if use else "none",
            "device_used_failed": use.failed if use else {},
            **self._sampler.figures(),
        }

    def close(self) -> None:
        """End the sampling."""
        self._sampler.stop()

    def write(
        self,
        folder: Path,
        run_facts: Mapping[str, Any],
        predicted: Mapping[str, int],
        predict_peaks: Callable[[], dict[str, dict[str, int]]] = dict,
    ) -> None:
        """Gather all ranks' records and write memory.json and memory_timeline.csv on rank 0. All ranks must call it.

        `predicted` are rows at the end, `predict_peaks` gives those of each phase's peak and is asked on rank 0.
        """
        records = self._world.gather(self.record())
        timelines = self._world.gather(self.timeline)
        if not self._world.is_main:
            return
        report = merge_ranks(records, run_facts, predicted, self.peak_step, self._world.device)
        if self.phases:
            report["phases"] = phase_ledgers(records[0], predict_peaks())
        temporary = folder / "memory.json.tmp"
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(folder / "memory.json")
        temporary = folder / "memory_timeline.csv.tmp"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, TIMELINE_COLUMNS)
            writer.writeheader()
            for timeline in timelines:
                writer.writerows(timeline)
        temporary.replace(folder / "memory_timeline.csv")


def _device_uuid(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def merge_ranks(
    records: Sequence[dict[str, Any]],
    run_facts: Mapping[str, Any],
    predicted: Mapping[str, int],
    peak_step: int,
    device: torch.device,
) -> dict[str, Any]:
    """The report of all ranks. Raises ValueError where ranks differ in unit, device type or number of ranks."""
    for key in ("unit", "device_type", "num_ranks", "device_used_source"):
        values = {record[key] for record in records}
        if len(values) > 1:
            raise ValueError(f"ranks disagree on {key} ({values}); one report cannot hold them, check the launch")
    on_gpu = device.type == "cuda"
    end = records[0]["ledger_end"]
    return {
        "schema": SCHEMA,
        "kind": "measured" if on_gpu else "host-standin",
        "note": "" if on_gpu else STANDIN_NOTE,
        "run": dict(run_facts),
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if on_gpu else None,
            "total_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
            "gpu_measured": on_gpu,
        },
        "sources": {
            "ledger": "unique tensor storages",
            "allocated": "torch.cuda.memory_stats" if on_gpu else "none",
            "device_used": records[0]["device_used_source"],
            "device_used_failed": records[0]["device_used_failed"],
            "host": "/proc/self/status",
        },
        "ranks": list(records),
        "reduced": reduce_ranks(records),
        "ledger": {
            "at": "end of training, after the last optimizer step",
            "rank": records[0]["rank"],
            "rows": [
                {"name": row, "measured_bytes": size, "predicted_bytes": predicted.get(row)}
                for row, size in end.items()
            ],
            "total_bytes": sum(end.values()),
            "optimizer_bytes": optimizer_bytes(end),
        },
        "ledger_peak": {
            "at": f"step {peak_step}, the highest total sampled",
            "rank": records[0]["rank"],
            "rows": [{"name": row, "measured_bytes": size} for row, size in records[0]["ledger_peak"].items()],
            "total_bytes": sum(records[0]["ledger_peak"].values()),
            "optimizer_bytes": optimizer_bytes(records[0]["ledger_peak"]),
        },
        "timeline": "memory_timeline.csv",
    }


def phase_ledgers(record: Mapping[str, Any], predicted: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
    """The ledger at the peak of each phase's step: measured, predicted, the difference, and what has no owner.

    `unexplained_bytes` is the allocator's peak less all rows; None where there is no allocator to ask.
    """
    phases = {}
    for name, phase in record["phases"].items():
        expected = predicted.get(name, {})
        rows = []
        for row in dict.fromkeys([*phase["rows"], *expected]):
            measured, wanted = phase["rows"].get(row, 0), expected.get(row, 0) if expected else None
            if measured or wanted:
                difference = None if wanted is None else measured - wanted
                rows.append(
                    {"name": row, "measured_bytes": measured, "predicted_bytes": wanted, "difference_bytes": difference}
                )
        total, allocated = sum(phase["rows"].values()), phase["allocated_peak_bytes"]
        phases[name] = {
            "at": f"the peak within step {phase['step']}",
            "rank": record["rank"],
            "rows": rows,
            "total_bytes": total,
            "predicted_total_bytes": sum(expected.values()) if expected else None,
            "allocated_peak_bytes": allocated,
            "unexplained_bytes": None if allocated is None else allocated - total,
        }
    return phases


def reduce_ranks(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """min, mean, max, sum and argmax_rank of every byte figure over the ranks; None where a rank has no reading.

    The sum of a whole device's use counts each device once, however many ranks share it.
    """
    flat = [dict(_byte_figures(record)) for record in records]
    reduced: dict[str, dict[str, float | int | None]] = {}
    for key in flat[0]:
        values = [figures.get(key) for figures in flat]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            reduced[key] = dict.fromkeys(("min", "mean", "max", "sum", "argmax_rank"))
            continue
        reduced[key] = {
            "min": min(known),
            "mean": sum(known) / len(known),
            "max": max(known),
            "sum": sum(_once_a_device(records, known) if key.startswith("device_used") else known),
            "argmax_rank": records[known.index(max(known))]["rank"],
        }
    return reduced


def _once_a_device(records: Sequence[Mapping[str, Any]], values: Sequence[int]) -> list[int]:
    """The highest reading of each device, by uuid and host."""
    highest: dict[tuple[Any, Any], int] = {}
    for record, value in zip(records, values, strict=True):
        key = record.get("host_name"), record.get("device_uuid") or record["rank"]
        highest[key] = max(value, highest.get(key, 0))
    return list(highest.values())


def _byte_figures(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | None]]:
    figures: list[tuple[str, int | None]] = []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            figures += _byte_figures(value, f"{name}.")
        elif key.endswith("_bytes") or prefix.startswith("ledger"):
            figures.append((name, value))
    return figures
