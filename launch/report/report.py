"""The report of a study: its text, and its tables as files (all_results.json in the original study's schema)."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from launch.report.accuracy import find_baseline, ours_section, ranking_section, versus_section
from launch.report.archive import RUNS_FILE, unpack, write_runs
from launch.report.html import as_code, as_text, to_html
from launch.report.memory import memory_section, study_column
from launch.report.precision import precision_section, with_agreement
from launch.report.runs import CellRun, Groups, group_by_method, top1
from launch.report.verdict import accuracy, verdict_section
from launch.report.words import words_section
from toolkit.files import csv_text, write_atomically, write_json
from toolkit.markdown import MIB, mib, page, table

_ON_CPU = """\
> **Run on CPU. No figure below is GPU memory.** Memory is counted in bytes of tensors."""
_LEDGER = """\
The memory columns are the tensor-byte ledger of a CPU run.
It holds the bytes of every weight, gradient, optimizer state, mask and score tensor, counted by storage.
They are the same on a GPU. There activations, workspaces and the allocator's cache come on top."""
_SYNTHETIC = "> **SYNTHETIC images**: accuracy says nothing about photographs."
_SECTIONS = {  # pictures that have one of their own, in this order; the rest follow them
    "memory_timeline.png": "Memory over training",
    "accuracy.png": "Accuracy over epochs",
    "sparsity.png": "Sparsity",
}
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


def write_report(
    runs: Sequence[CellRun], out: Path, source: Path, baseline: str | None = None, *, brief: bool = False
) -> None:
    """Write the report of `runs` into the folder `out`, or its tables into a file `out` that ends in .md.

    `baseline`: the method, or one of its runs, that rankings compare with instead of a sparsity's best adamwprune.
    `brief`: only report.md, its pictures, summary.json and the runs. Raises ValueError for a baseline not among them.
    """
    from launch.report.charts import CHARTS, as_json, chart_data
    from launch.report.pictures import draw_all

    runs = with_agreement(runs)
    groups = group_by_method(runs)
    base = find_baseline(groups, baseline)
    made_by = _made_by(runs, source, out, base, brief)
    if out.suffix == ".md":
        write_atomically(out, page(*_markdown(runs, groups, [], out, base), made_by))
        return
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(groups, out)
    unpack_again = as_code(f"python -m launch.report {out / RUNS_FILE} --unpack FOLDER")
    kept = f"Settings, metrics and memory of every run are in {RUNS_FILE}. Run folders again: {unpack_again}."
    text = page(*_markdown(runs, groups, pictures, out, base), kept, "", made_by)
    write_atomically(out / "report.md", text)
    write_json(out / "summary.json", summary(runs, groups), indent=1)
    write_runs(runs, out / RUNS_FILE)
    if brief:
        return
    write_atomically(out / "summary.csv", summary_csv(groups))
    write_json(out / "all_results.json", [original_result(run) for run in runs])
    unpack(runs, out / "cells")
    drawn = [(name, caption) for name, caption in pictures if name in CHARTS]
    text = page(*_markdown(runs, groups, drawn, out, base), kept, "", made_by)
    write_atomically(out / "report.html", to_html(text, _alternative_texts(groups, drawn), as_json(chart_data(groups))))


def _alternative_texts(groups: Groups, pictures: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What each picture shows, for those who do not see it; the figures themselves are in the tables."""
    names = f"{len(groups)} methods" if len(groups) > 8 else ", ".join(groups)
    return {name: f"Chart: {caption}. Shown: {names}. The figures are in the tables." for name, caption in pictures}


def _markdown(
    runs: Sequence[CellRun], groups: Groups, pictures: Sequence[tuple[str, str]], out: Path, baseline: str | None
) -> list[str]:
    shared, groups = environment(runs), {as_text(name): members for name, members in groups.items()}
    on_cpu = any(run.metrics["device_type"] == "cpu" for run in runs)
    captions = dict(pictures)
    rest = [name for name in captions if name not in ("pareto.png", *_SECTIONS)]
    return [
        f"# {as_text(out.name.removesuffix('.md'))}: {_said(shared['model'])} on {_said(shared['dataset'])}",
        "",
        *([_ON_CPU, ""] if on_cpu else []),
        *([_SYNTHETIC, ""] if shared["dataset_synthetic"] else []),
        f"Each run: {_said(shared['epochs'])} epochs; {_said(shared['dataset_note']).rpartition('; ')[2]}.",
        "",
        *verdict_section(groups, _figure("pareto.png", captions)),
        *[
            line
            for name, title in _SECTIONS.items()
            if name in captions
            for line in (f"## {title}", "", *_figure(name, captions))
        ],
        *(["## More pictures", ""] if rest else []),
        *[line for name in rest for line in _figure(name, captions)],
        *ours_section(groups),
        *(ranking_section(groups, baseline and as_text(baseline)) if len(groups) > 1 else []),
        *precision_section(groups),
        *versus_section(groups),
        *_speed_section(groups),
        *memory_section(groups),
        *_settings_section(groups),
        *words_section(groups),
        "## How it was measured",
        "",
        _circumstances(runs, shared),
        "",
        *([_LEDGER, ""] if on_cpu else []),
    ]


def _figure(name: str, captions: Mapping[str, str]) -> list[str]:
    """The lines of a picture that was drawn."""
    return [f"![{captions[name]}]({name})", "", f"*{captions[name]}*", ""] if name in captions else []


def _circumstances(runs: Sequence[CellRun], shared: dict[str, Any]) -> str:
    """Data, hardware, versions, seeds and what all runs were trained with."""
    versions = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in run.metrics["versions"].items()) for run in runs
    )
    seeds = (
        "Accuracy is mean ± standard deviation over the seeds."
        if len(shared["seeds"]) > 1
        else "One seed: differences of a point or so are noise, and no rank is claimed."
    )
    return (
        f"Data: {_said(shared['dataset_note'] or shared['dataset'])}. Evaluated on its split "
        f"{_said([run.arguments['val_split'] for run in runs])}. Hardware: {_said(shared['world_size'])} "
        f"ranks on {_said(shared['device'])}. Versions: {as_text('; '.join(versions))}. Seeds: "
        f"{', '.join(map(as_text, shared['seeds']))}. {seeds} "
        f"Global batch {_said(shared['global_batch_size'])}, {_said(shared['epochs'])} epochs, precision "
        f"{_said(shared['mixed_precision'])}."
    )


def _made_by(runs: Sequence[CellRun], source: Path, out: Path, baseline: str | None, brief: bool) -> str:
    runs_from = as_code(runs[0].made_by) if runs[0].made_by else f"those in {as_code(source)}"
    flags = f"{f' --baseline {shlex.quote(baseline)}' if baseline else ''}{' --brief' if brief else ''}"
    command = f"python -m launch.report {source} --out {out}{flags}"
    return f"Runs: {runs_from}. Made by {as_code(command)}."


def _said(value: Any) -> str:
    """A value that all runs share, or each one that occurs."""
    return as_text(" or ".join(sorted({str(one) for one in value})) if isinstance(value, list) else value)


def _speed_section(groups: Groups) -> list[str]:
    return [
        "## Speed",
        "",
        *table(
            ["method", "images/s", "training s"],
            [
                [
                    name,
                    f"{fmean(run.metrics['images_per_sec'] for run in members):.0f}",
                    f"{median(run.train_s for run in members):.0f}",
                ]
                for name, members in groups.items()
            ],
        ),
        "",
        "Mean and median over the runs as they came, others beside them or not: a rough guide. "
        "Steps are timed against each other in results/bench.",
        "",
    ]


def _settings_section(groups: Groups) -> list[str]:
    return [
        "## Settings",
        "",
        *table(
            ["method", *next(iter(groups.values()))[0].main_settings],
            [[name, *map(as_text, run.main_settings.values())] for name, (run, *_) in groups.items()],
        ),
        "",
    ]


def printed_table(groups: Groups) -> str:
    """The report in a few columns, for a terminal."""
    width = max(len(name) for name in groups)
    lines = [f"{'method':<{width}}  {'top-1 %':>14}  {'sparsity':>9}  {'optimizer+pruning MiB (end)':>28}"]
    for name, members in groups.items():
        reached = ", ".join(sorted({f"{100 * run.metrics['final_sparsity']:.2f} %" for run in members}))
        sparsity = "–" if members[0].method == "none" else reached  # a weight that is 0 by chance is no pruning
        size = mib(members[0].memory["ledger"]["optimizer_bytes"])
        lines.append(f"{name:<{width}}  {accuracy(members):>14}  {sparsity:>9}  {size:>28}")
    return "\n".join(lines)


def environment(runs: Sequence[CellRun]) -> dict[str, Any]:
    """What all runs share, and each value once where they do not."""
    shared: dict[str, Any] = {}
    for key in _SHARED:
        found: list[Any] = []
        for run in runs:
            if run.metrics[key] not in found:
                found.append(run.metrics[key])
        shared[key] = found if len(found) > 1 else found[0]
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
        "optimizer_peak_bytes": run.peak_state_bytes,
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
