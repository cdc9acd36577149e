"""One memory report for a run, from all ranks' records: memory.json, memory.md and memory_timeline.csv.

On a machine without an accelerator the kind is `host-standin`: device fields are null, and the tensor-byte ledger is
the primary figure. It is exact on any device; host RSS is shown beside it and is not GPU memory.
"""

import csv
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.dist import World
from toolkit.files import csv_text, write_atomically, write_json
from toolkit.memory.ledger import optimizer_bytes
from toolkit.memory.markdown import to_markdown
from toolkit.memory.recorder import RANKS_FOLDER, TIMELINE_COLUMNS, MemoryLog
from toolkit.memory.reduce import phase_ledgers, reduce_ranks

__all__ = ["SCHEMA", "merge_ranks", "write_report", "write_report_of_survivors"]

SCHEMA = "memory-report/1"
STANDIN_NOTE = "NO GPU: tensor-byte ledger and host RSS; not comparable with GPU memory"
_SETTLE_S = 2.0  # survivors' last words may lie this far apart

Predict = Callable[[], tuple[dict[str, int], dict[str, dict[str, int]]]]


def write_report(log: MemoryLog, world: World, folder: Path, run_facts: Mapping[str, Any], predict: Predict) -> None:
    """Gather all ranks' records and write the report on rank 0. All ranks must call it.

    `predict` gives the rows at the end, and those of the phases' peaks; it is asked on rank 0.
    """
    records = world.gather(log.record())
    timelines = world.gather(log.timeline)
    if world.is_main:
        report = merge_ranks(records, run_facts, *predict(), world.device)
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
    report = merge_ranks(records, run_facts, *predict(), world.device, lost=lost)
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
