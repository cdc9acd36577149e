"""The report's tables as files: summary.json, summary.csv, all_results.json in the original study's schema."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from launch.report.memory import study_column
from launch.report.runs import CellRun, Groups, top1
from toolkit.files import csv_text
from toolkit.markdown import MIB

_SHARED = (
    "model",
    "dataset",
    "dataset_note",
    "dataset_synthetic",
    "device",
    "device_type",
    "world_size",
    "threads_per_rank",
    "global_batch_size",
    "epochs",
    "mixed_precision",
    "versions",
)
_OF_A_RUN = (
    "model",
    "opt",
    "pruning",
    "seed",
    "final_top1",
    "best_top1",
    "best_epoch",
    "target_sparsity",
    "final_sparsity",
    "images_per_sec",
    "completed",
)


def environment(runs: Sequence[CellRun]) -> dict[str, Any]:
    """What all runs share, and every value where they do not."""
    found = {key: [run.metrics[key] for run in runs] for key in _SHARED}
    shared = {key: values[0] if values.count(values[0]) == len(values) else values for key, values in found.items()}
    return shared | {"seeds": sorted({run.metrics["seed"] for run in runs})}


def summary(runs: Sequence[CellRun], groups: Groups) -> dict[str, Any]:
    """What summary.json holds: every run, and of every method the mean and spread (None for one seed)."""
    return {
        "schema": "study-summary/1",
        "environment": environment(runs),
        "cells": [_of_a_run(run) for run in runs],
        "methods": [
            {
                "method": name,
                "seeds": [run.metrics["seed"] for run in members],
                "final_top1_mean": top1(members)[0],
                "final_top1_stdev": top1(members)[1],
            }
            for name, members in groups.items()
        ],
    }


def _of_a_run(run: CellRun) -> dict[str, Any]:
    return {
        "name": run.folder.name,
        **{key: run.metrics[key] for key in _OF_A_RUN},
        "lr": run.lr,
        "weight_decay": run.arguments["weight_decay"],
        "train_s": run.train_s,
        "optimizer_end_bytes": run.memory["ledger"]["optimizer_bytes"],
        "optimizer_peak_bytes": run.memory["ledger_peak"]["optimizer_bytes"],
        "ledger_end_bytes": run.memory["ledger"]["total_bytes"],
        "ledger_peak_bytes": run.memory["ledger_peak"]["total_bytes"],
        "optimizer_bytes_per_weight": run.bytes_per_weight,
        "ledger_rows_end_bytes": {row["name"]: row["measured_bytes"] for row in run.memory["ledger"]["rows"]},
        "peak_of_a_step_bytes": {name: phase["total_bytes"] for name, phase in run.memory["phases"].items()},
        "allocated_peak_bytes": run.memory["reduced"]["peaks.life.allocated_peak_bytes"]["max"],
        **study_column(run),
    }


def summary_csv(groups: Groups) -> str:
    """One row a method: accuracy over seeds, bytes of the first seed (they do not vary), speed."""
    rows = [_of_a_method(name, members) for name, members in groups.items()]
    return csv_text(list(rows[0]), rows)


def _of_a_method(name: str, members: Sequence[CellRun]) -> Mapping[str, Any]:
    first = members[0]
    return {
        "method": name,
        "optimizer": first.optimizer,
        "pruning": first.method,
        "target_sparsity": first.sparsity,
        "final_sparsity": first.metrics["final_sparsity"],
        "seeds": " ".join(str(run.metrics["seed"]) for run in members),
        "top1_mean": top1(members)[0],
        "top1_stdev": top1(members)[1],
        "best_top1_mean": top1(members, "best")[0],
        "optimizer_end_bytes": first.memory["ledger"]["optimizer_bytes"],
        "state_bytes_per_weight": first.bytes_per_weight,
        "ledger_end_bytes": first.memory["ledger"]["total_bytes"],
        "ledger_peak_bytes": first.memory["ledger_peak"]["total_bytes"],
        "images_per_sec": fmean(run.metrics["images_per_sec"] for run in members),
        "train_s": fmean(run.train_s for run in members),
        "lr": first.lr,
        "weight_decay": first.arguments["weight_decay"],
    }


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
        "elapsed_time": run.train_s,
        "success": metrics["completed"],
        "train_loss": metrics["train_loss"],
        "test_loss": metrics["eval_loss"],
        "test_accuracy": metrics["eval_top1"],
        "sparsity": metrics["sparsity"],
        "epoch_times": metrics["epoch_s"],
        "total_time": run.train_s,
        "best_accuracy": metrics["best_top1"],
        "final_accuracy": metrics["final_top1"],
        "final_sparsity": metrics["final_sparsity"],
        "epochs_completed": len(metrics["train_loss"]),
        "gpu_memory_mean": record["device_used_study_mib"],
        "gpu_memory_max": None if peak is None else peak / MIB,
        "seed": metrics["seed"],
    }
