"""One memory report for a run, from all ranks' records: memory.json, memory.md and memory_timeline.csv.

On a machine without an accelerator the kind is `host-standin`: device fields are null, and the tensor-byte ledger is
the primary figure. It is exact on any device; host RSS is shown beside it and is not GPU memory.
"""

import csv
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.dist import World
from toolkit.files import csv_text, write_atomically, write_json
from toolkit.memory.ledger import optimizer_bytes
from toolkit.memory.markdown import to_markdown
from toolkit.memory.recorder import RANKS_FOLDER, TIMELINE_COLUMNS, MemoryLog

SCHEMA = "memory-report/1"
STANDIN_NOTE = "NO GPU: tensor-byte ledger and host RSS; not comparable with GPU memory"
# The prediction that a phase's peak is set beside; the others have none.
_PREDICTED_AS = {"warm_up": "dense", "dense": "dense", "final": "final"}
_SETTLE_S = 2.0  # survivors' last words may lie this far apart

Predict = Callable[[int], tuple[dict[str, int], dict[str, dict[str, int]]]]


def write_report(log: MemoryLog, world: World, folder: Path, run_facts: Mapping[str, Any], predict: Predict) -> None:
    """Gather all ranks' records and write the report on rank 0. All ranks must call it.

    `predict` gives the rows of a rank at the end, and those of the phases' peaks; it is asked on rank 0, for rank 0.
    """
    records = world.gather(log.record())
    timelines = world.gather(log.timeline)
    if world.is_main:
        report = merge_ranks(records, run_facts, *predict(world.rank), world.device)
        _write(report, folder, (row for timeline in timelines for row in timeline))
        shutil.rmtree(folder / RANKS_FOLDER, ignore_errors=True)


def write_report_of_survivors(
    log: MemoryLog, world: World, folder: Path, run_facts: Mapping[str, Any], predict: Predict, reason: str
) -> list[dict[str, Any]]:
    """Write the report without a collective, after a rank was lost. Every rank that is left may call it.

    Each leaves its record on disk and, when the others have had time for theirs, writes the same report of all of them,
    which names the ranks that left no last word; these are returned.
    """
    log.close_record(reason)
    if world.num_ranks > 1:
        time.sleep(_SETTLE_S)
    records, lost, rows = [], [], []
    for rank in range(world.num_ranks):
        file = folder / RANKS_FOLDER / f"rank{rank:05d}.json"
        record = json.loads(file.read_text()) if file.exists() else None
        if record is None or "ended" not in record:
            lost.append({"rank": rank, "last_step": record["last_step"] if record else None, "last_record": record})
            continue
        records.append(record)
        if file.with_suffix(".csv").exists():
            with open(file.with_suffix(".csv"), newline="") as table:
                rows += list(csv.DictReader(table))
    report = merge_ranks(records, run_facts, *predict(records[0]["rank"]), world.device, lost=lost)
    _write(report, folder, rows)
    return lost


def _write(report: dict[str, Any], folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_json(folder / "memory.json", report, indent=1)
    write_atomically(folder / "memory_timeline.csv", csv_text(TIMELINE_COLUMNS, rows))
    write_atomically(folder / "memory.md", to_markdown(report))


def merge_ranks(
    records: Sequence[dict[str, Any]],
    run_facts: Mapping[str, Any],
    predicted: Mapping[str, int],
    predicted_peaks: Mapping[str, Mapping[str, int]],
    device: torch.device,
    lost: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The report of all ranks. Raises ValueError where ranks differ in unit, device, source or number of ranks."""
    for key in ("unit", "device_type", "num_ranks", "device_used_source"):
        values = {record[key] for record in records}
        if len(values) > 1:
            raise ValueError(f"ranks disagree on {key} ({values}); one report cannot hold them, check the launch")
    on_gpu = device.type == "cuda"
    first = records[0]
    end, peak = first["ledger_end"], first["ledger_peak"]
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
            "device_used": first["device_used_source"],
            "device_used_failed": first["device_used_failed"],
            "device_load": first.get("device_load_source", "none"),
            "device_load_failed": first.get("device_load_failed", {}),
            "host": "/proc/self/status",
        },
        "lost_ranks": list(lost),
        "ranks": list(records),
        "reduced": reduce_ranks(records),
        "ledger": {
            "at": "end of training, after the last optimizer step",
            "rank": first["rank"],
            "rows": [
                {"name": row, "measured_bytes": size, "predicted_bytes": predicted.get(row)}
                for row, size in end.items()
            ],
            "total_bytes": sum(end.values()),
            "optimizer_bytes": optimizer_bytes(end),
        },
        "ledger_peak": {
            "at": f"step {first['ledger_peak_step']}, the highest total sampled between steps",
            "rank": first["rank"],
            "rows": [{"name": row, "measured_bytes": size} for row, size in peak.items()],
            "total_bytes": sum(peak.values()),
            "optimizer_bytes": optimizer_bytes(peak),
        },
        "phases": phase_ledgers(first, predicted_peaks),
        "timeline": "memory_timeline.csv",
    }


def phase_ledgers(record: Mapping[str, Any], predicted: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
    """The ledger at the peak of each phase's probed step: measured, predicted, the difference, and what has no owner.

    What the allocator and the device hold beyond the rows follows from the same step's readings, and is None where
    there is no allocator: rows + rounding + BLAS workspaces + unexplained = allocated, + cache = reserved, + context
    and others = the whole device, whose peak is that of the run.
    """
    phases = {}
    for name, phase in record["phases"].items():
        expected = predicted.get(_PREDICTED_AS.get(name, ""), {})
        rows = []
        for row in dict.fromkeys([*phase["rows"], *expected]):
            measured, wanted = phase["rows"].get(row, 0), expected.get(row, 0) if expected else None
            if measured or wanted:
                difference = None if wanted is None else measured - wanted
                rows.append(
                    {"name": row, "measured_bytes": measured, "predicted_bytes": wanted, "difference_bytes": difference}
                )
        total, peaks = sum(phase["rows"].values()), phase["peaks"]
        phases[name] = {
            "at": f"the peak within step {phase['step']}, in its {phase['part']}",
            "rank": record["rank"],
            "rows": rows,
            "total_bytes": total,
            "predicted_total_bytes": sum(expected.values()) if expected else None,
            **_above(total, peaks, phase.get("blas_workspaces_bytes"), record["device_used_peak_bytes"]),
        }
    return phases


def _above(
    total: int, peaks: Mapping[str, int], workspaces: int | None, device_used: int | None
) -> dict[str, int | None]:
    allocated, requested = peaks.get("allocated_peak_bytes"), peaks.get("requested_peak_bytes")
    reserved = peaks.get("reserved_peak_bytes")
    rounding = None if allocated is None or requested is None else allocated - requested
    return {
        "rounding_bytes": rounding,
        "blas_workspaces_bytes": workspaces,
        "unexplained_bytes": None if allocated is None else allocated - (rounding or 0) - (workspaces or 0) - total,
        "allocated_peak_bytes": allocated,
        "allocator_cache_bytes": None if reserved is None or allocated is None else reserved - allocated,
        "reserved_peak_bytes": reserved,
        "context_and_others_bytes": None if reserved is None or device_used is None else device_used - reserved,
        "device_used_peak_bytes": device_used,
    }


def reduce_ranks(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """min, mean, max, sum and argmax_rank of every byte figure over the ranks; None where a rank has no reading.

    A ledger row that a rank does not have is 0 there. The sum of a whole device's use counts each device once, however
    many ranks share it.
    """
    flat = [dict(_byte_figures(record)) for record in records]
    reduced: dict[str, dict[str, float | int | None]] = {}
    for key in dict.fromkeys(key for figures in flat for key in figures):
        absent = 0 if key.startswith(("ledger_", "phases.")) else None
        values = [figures.get(key, absent) for figures in flat]
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


def _byte_figures(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Every `_bytes` figure and ledger row, and the totals of the ledgers, by dotted name."""
    is_ledger = prefix.startswith("ledger_") or prefix.endswith(".rows.")
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _byte_figures(value, f"{prefix}{key}.")
        elif key.endswith("_bytes") or is_ledger:
            yield f"{prefix}{key}", value
    if is_ledger:
        yield f"{prefix}total", sum(record.values())
