"""What launch.gpu_check writes for people: the machine, the parts and how they ended, times, runs, last words."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.report.runs import CellRun
from toolkit.markdown import mib, page, table

_PAGES = {"bench-device/1": "launch.bench.device"}  # schema of a part's result -> whose page it is
_PHASES = ("dense", "ramp", "final")
_PEAKS = ("total_bytes", "predicted_total_bytes", "allocated_peak_bytes", "reserved_peak_bytes", "unexplained_bytes")
_BETWEEN_STEPS = ("ledger_bytes", "allocated_bytes", "reserved_bytes")
_LAST_LINES = 15


def run_row(run: CellRun, study: str) -> dict[str, Any]:
    """What a finished run says of accuracy, speed and memory, predicted beside measured; None where no GPU told."""
    record, timeline = run.memory["ranks"][0], run.timeline
    allocated = [int(row["allocated_bytes"]) for row in timeline if row.get("allocated_bytes")]
    return {
        "study": study,
        "name": run.folder.name,
        "label": run.label,
        **{key: run.metrics[key] for key in ("model", "opt", "dataset", "device", "mixed_precision", "seed")},
        "sparsity": run.metrics["final_sparsity"],
        "top1": run.metrics["final_top1"],
        "images_per_sec": run.metrics["images_per_sec"],
        "state_bytes_per_weight": run.bytes_per_weight,
        "allocated_mean_bytes": sum(allocated) / len(allocated) if allocated else None,
        "end": {key: timeline[-1].get(key) or None for key in ("allocated_bytes", "reserved_bytes")}
        if timeline
        else {},
        "phases": {
            name: {key: phase[key] for key in _PEAKS} for name, phase in run.memory["phases"].items() if name in _PHASES
        },
        "peaks": record["peaks"],
        "resumes": list(_resumes(timeline, record)),
        **{f"device_used_{key}": record[f"device_used_{key}"] for key in ("mean_bytes", "peak_bytes", "study_mib")},
    }


def _resumes(timeline: Sequence[Mapping[str, str]], record: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Of each resume the last sample before it and the first one after; None where no GPU told."""
    rows = [row for row in timeline if int(row["rank"]) == record["rank"]]
    for step in record.get("resumed_after_steps", []):
        last = [row for row in rows if int(row["step"]) <= step][-1:]
        pair = [*last, *[row for row in rows if int(row["step"]) > step][:1]]
        if len(pair) == 2:
            figures = [{key: int(row[key]) if row[key] else None for key in _BETWEEN_STEPS} for row in pair]
            yield [
                {"step": int(row["step"]), "phase": row["phase"], **own} for row, own in zip(pair, figures, strict=True)
            ]


def to_markdown(result: Mapping[str, Any]) -> str:
    """The page beside gpu_check.json."""
    parts = result["parts"]
    facts = (parts.get("facts") or {}).get("result") or {}
    lines = [
        f"# GPU check: {facts.get('device', 'the machine did not say')}",
        "",
        f"Made by `{result['command']}`."
        + ("" if facts.get("kind") == "cuda" else " **No GPU: a stand-in, no figure of a GPU.**"),
        "",
        *table(["fact", "value"], [[key.replace("_", " "), value] for key, value in facts.items()], text=(0, 1)),
        "",
        "## Parts",
        "",
        *table(
            ["part", "ended", "seconds", "command"],
            [[name, part["outcome"], part["seconds"], f"`{part['command']}`"] for name, part in parts.items()],
            text=(0, 1, 3),
        ),
        "",
        f"Not run: {', '.join(result['not_run']) or 'nothing'}.",
    ]
    for name, part in parts.items():
        if part["outcome"] != "ok":
            words = "\n".join(part[stream].strip() for stream in ("stdout", "stderr") if part[stream]).splitlines()
            lines += ["", f"## {name}: {part['outcome']}", "", "```", *words[-_LAST_LINES:], "```"]
        module = _PAGES.get((part["result"] or {}).get("schema", ""))
        if module:
            text = importlib.import_module(module).to_markdown(part["result"], part["command"])
            lines += ["", "#" + text.rstrip()]
    return page(*lines, *_runs(result["runs"]), *_resume_table(result["runs"]))


def _runs(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    memory = [
        [row["study"], row["name"], phase, *(mib(peaks[key], 1) for key in _PEAKS)]
        for row in rows
        for phase, peaks in row["phases"].items()
    ]
    runs = [
        [
            row["study"],
            row["name"],
            f"{row['top1']:.2f}",
            f"{100 * row['sparsity']:.2f} %",
            f"{row['images_per_sec']:,.0f}",
            f"{row['state_bytes_per_weight']:.3f}",
            mib(row["allocated_mean_bytes"], 1),
            *(mib(row[f"device_used_{key}_bytes"], 1) for key in ("mean", "peak")),
            *(mib(int(value) if value else None, 1) for value in (row["end"] or {"": None, " ": None}).values()),
        ]
        for row in rows
    ]
    header = ["study", "run", "top-1 %", "sparsity", "images/s", "state bytes a weight", "allocated, mean MiB"]
    header += ["device used, mean", "peak", "at the end: allocated", "reserved"]
    return [
        *("", "## Runs of train.py", "", *table(header, runs, text=(0, 1))),
        *("", "## A step's peak by phase, MiB", ""),
        *table(
            ["study", "run", "phase", "tensors", "predicted", "allocated", "reserved", "unexplained"],
            memory,
            text=(0, 1, 2),
        ),
    ]


def _resume_table(rows: list[dict[str, Any]]) -> list[str]:
    """Others hold twice the memory after a resume; the build's peak has the loading in it."""
    found = [
        [
            row["study"],
            row["name"],
            *(f"{one['step']}, {one['phase']}" for one in pair),
            *(mib(one[key], 1) for key in _BETWEEN_STEPS for one in pair),
            mib(row["peaks"]["build"]["allocated_peak_bytes"], 1),
        ]
        for row in rows
        for pair in row["resumes"]
    ]
    if not found:
        return []
    header = ["study", "run", "step before", "after", "tensors before", "after", "allocated before", "after"]
    header += ["reserved before", "after", "allocated at most while building and loading"]
    return ["", "## Memory before and after a resume, MiB", "", *table(header, found, text=(0, 1, 2, 3))]
