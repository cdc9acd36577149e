"""The memory tables of a report: what training keeps, what a step's peak is made of, and the study's own column."""

import json
from collections.abc import Sequence
from pathlib import Path

from launch.runs import CellRun

__all__ = ["memory_section", "mib", "study_column", "table"]

MIB = 2**20
_LEDGER_NOTE = """\
Optimizer state: moments and step counters. Masks and scores: bit masks, offset tables, movement scores. The peak lies
before the pruning ramp, where moments are still dense; the end is what stays from the last mask update on."""
_PEAK_NOTE = """\
Everything that was alive at the fullest moment of one probed step a phase, activations and workspace included, beside
what was predicted before the run from fake tensors and arithmetic. With several CPU ranks a step may hold more than
predicted: convolutions take another path on one thread. Where the batch is small the fullest moment lies in the update,
whose copies (torch's own optimizers make some) are not predicted. Every row of every rank: memory.json of the cell."""
_STUDY_NOTE = """\
Whole-device use, read once a second over the process's life, each reading cut down to whole MiB; accuracy per 1,000 MiB
of its mean. It counts the allocator's cache and everybody else on the card, so it says little about an optimizer; it
is here because the study ranks by it. *As reported* are the study's figures for its own task (CIFAR-100 at 224 px by
its public code, batch 128): its AdamWPrune row was not pruned, see results/reference. Never compare the two halves."""
_REFERENCE = Path(__file__).parent.parent / "results" / "reference" / "original_study.json"


def mib(size: float) -> str:
    """Bytes as MiB for a table."""
    return f"{size / MIB:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others figures."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, align, *rows)]


def study_column(run: CellRun) -> dict[str, float | None]:
    """The original study's figures: whole-device use over rank 0's life in MiB, each reading cut down to whole MiB,
    its mean and peak; accuracy per 1,000 MiB of the mean. None without a GPU.
    """
    record = run.memory["ranks"][0]
    mean, peak = record["device_used_study_mib"], record["device_used_peak_bytes"]
    return {
        "study_mean_mib": mean,
        "study_peak_mib": None if peak is None else peak // MIB,
        "study_top1_per_1000_mib": None if mean is None else run.metrics["final_top1"] / (mean / 1000),
    }


def memory_section(groups: dict[str, list[CellRun]]) -> list[str]:
    """The report's lines on memory; of each method the first seed, for bytes do not vary."""
    return [
        "## Memory of the tensors that training keeps (MiB, one rank)",
        "",
        *table(
            ["method", "optimizer state, end", "masks and scores, end", "sum, end", "bytes per weight, end",
             "sum, peak", "all tensors, end", "all tensors, peak"],
            [
                [
                    name,
                    mib(run.memory["ledger"]["optimizer_bytes"] - run.pruning_bytes),
                    mib(run.pruning_bytes),
                    mib(run.memory["ledger"]["optimizer_bytes"]),
                    f"{run.bytes_per_weight:.3f}",
                    mib(run.memory["ledger_peak"]["optimizer_bytes"]), mib(run.memory["ledger"]["total_bytes"]),
                    mib(run.memory["ledger_peak"]["total_bytes"]),
                ]
                for name, (run, *_) in groups.items()
            ],
        ),
        "",
        _LEDGER_NOTE,
        "",
        "### Who owns it, at the end (MiB)",
        "",
        *_ledger_table(groups),
        "",
        "### A step's peak (MiB, rank 0)",
        "",
        *_peak_table(groups),
        "",
        _PEAK_NOTE,
        "",
        "### The study's own column",
        "",
        *_study_table(groups),
        "",
        _STUDY_NOTE,
        "",
    ]  # fmt: skip


def _ledger_table(groups: dict[str, list[CellRun]]) -> list[str]:
    rows: dict[str, list[str]] = {}
    names = list(groups)
    for position, (run, *_) in enumerate(groups.values()):
        for row in run.memory["ledger"]["rows"]:
            if row["measured_bytes"]:
                rows.setdefault(row["name"], ["–"] * len(names))[position] = mib(row["measured_bytes"])
    return table(["row", *names], [[row, *cells] for row, cells in rows.items()])


def _peak_table(groups: dict[str, list[CellRun]]) -> list[str]:
    rows = []
    for name, (run, *_) in groups.items():
        for phase, ledger in run.memory["phases"].items():
            keys = ("total_bytes", "predicted_total_bytes", "allocated_peak_bytes", "unexplained_bytes")
            cells = ["–" if ledger[key] is None else mib(ledger[key]) for key in keys]
            rows.append([name, phase.replace("_", " "), *cells])
    return table(["method", "phase", "measured", "predicted", "allocator's peak", "unexplained"], rows)


def _study_table(groups: dict[str, list[CellRun]]) -> list[str]:
    reported = {row["optimizer"]: row for row in json.loads(_REFERENCE.read_text())["rows"]}
    rows = []
    for name, (run, *_) in groups.items():
        mine = study_column(run)
        base = str(run.metrics["opt"]).partition("-")[0]
        theirs = reported.get({"momentum": "sgd"}.get(base, base), {})
        cells = [mine["study_mean_mib"], mine["study_peak_mib"], mine["study_top1_per_1000_mib"]]
        cells += [theirs.get(key) for key in ("memory_mean", "memory_peak", "acc_per_gb")]
        rows.append([name, *("–" if cell is None else f"{cell:,.2f}" for cell in cells)])
    header = ["method", "mean MiB", "peak MiB", "top-1 per 1,000 MiB", "as reported: mean", "peak", "acc/GB"]
    return table(header, rows)
