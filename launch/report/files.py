"""The report's tables as files: summary.csv, all_results.json in the original study's schema, cells/."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.report.runs import CellRun
from launch.report.significance import mean_and_spread

__all__ = ["copy_cells", "original_result", "write_all_results", "write_summary_csv"]

_COLUMNS = (
    "method",
    "optimizer",
    "pruning",
    "target_sparsity",
    "final_sparsity",
    "seeds",
    "top1_mean",
    "top1_stdev",
    "best_top1_mean",
    "optimizer_end_bytes",
    "state_bytes_per_weight",
    "ledger_end_bytes",
    "ledger_peak_bytes",
    "images_per_sec",
    "train_s",
    "lr",
    "weight_decay",
)


def write_summary_csv(groups: Mapping[str, Sequence[CellRun]], path: Path) -> None:
    """One row a method: accuracy over seeds, bytes of the first seed (they do not vary), speed."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for name, members in groups.items():
            first = members[0]
            mean, spread = mean_and_spread([run.metrics["final_top1"] for run in members])
            ledger, peak = first.memory["ledger"], first.memory["ledger_peak"]
            writer.writerow(
                {
                    "method": name,
                    "optimizer": first.optimizer,
                    "pruning": first.method,
                    "target_sparsity": first.sparsity,
                    "final_sparsity": first.metrics["final_sparsity"],
                    "seeds": " ".join(str(run.metrics["seed"]) for run in members),
                    "top1_mean": mean,
                    "top1_stdev": spread,
                    "optimizer_end_bytes": ledger["optimizer_bytes"],
                    "best_top1_mean": mean_and_spread([run.metrics["best_top1"] for run in members])[0],
                    "state_bytes_per_weight": first.bytes_per_weight,
                    "ledger_end_bytes": ledger["total_bytes"],
                    "ledger_peak_bytes": peak["total_bytes"],
                    "images_per_sec": mean_and_spread([run.metrics["images_per_sec"] for run in members])[0],
                    "train_s": mean_and_spread([sum(run.metrics["epoch_s"]) for run in members])[0],
                    "lr": first.lr,
                    "weight_decay": first.arguments["weight_decay"],
                }
            )


def original_result(run: CellRun) -> dict[str, Any]:
    """A run as the original study's test matrix wrote it, so that its plotting scripts work; accuracies in percent.

    `final_accuracy` is ours: the original left it out, and its plots then showed 0. Memory in MiB of the whole device,
    None without a GPU.
    """
    metrics, record = run.metrics, run.memory["ranks"][0]
    peak = record["device_used_peak_bytes"]
    return {
        "test_id": run.folder.name,
        "model": metrics["model"],
        "optimizer": run.optimizer,
        "pruning": run.method,
        "target_sparsity": run.sparsity,
        "elapsed_time": sum(metrics["epoch_s"]),
        "success": metrics["completed"],
        "train_loss": metrics["train_loss"],
        "test_loss": metrics["eval_loss"],
        "test_accuracy": metrics["eval_top1"],
        "sparsity": metrics["sparsity"],
        "epoch_times": metrics["epoch_s"],
        "total_time": sum(metrics["epoch_s"]),
        "best_accuracy": metrics["best_top1"],
        "final_accuracy": metrics["final_top1"],
        "final_sparsity": metrics["final_sparsity"],
        "epochs_completed": len(metrics["train_loss"]),
        "gpu_memory_mean": record["device_used_study_mib"],
        "gpu_memory_max": None if peak is None else peak / 2**20,
        "seed": metrics["seed"],
    }


def write_all_results(runs: Sequence[CellRun], path: Path) -> None:
    """all_results.json: a list, one entry a run."""
    path.write_text(json.dumps([original_result(run) for run in runs]) + "\n")


def copy_cells(runs: Sequence[CellRun], out: Path) -> None:
    """Each run's settings and records under out/cells/<run>/; JSON without spaces, for there may be hundreds."""
    for run in runs:
        cell = out / run.folder.name
        cell.mkdir(parents=True, exist_ok=True)
        for name in ("args.yaml", "summary.csv"):
            shutil.copyfile(run.folder / name, cell / name)
        for name, content in (("metrics.json", run.metrics), ("memory.json", run.memory)):
            (cell / name).write_text(json.dumps(content, separators=(",", ":")) + "\n")
