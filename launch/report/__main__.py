"""`python -m launch.report RUNS --out results/<study>`: run folders -> report.md, summary.json and pictures.

Every figure is read from the run folders' metrics.json, memory.json, summary.csv and memory_timeline.csv; nothing is
typed in. Final-epoch accuracy is the headline, the best epoch stands beside it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from launch.report.accuracy import OURS, accuracy, by_seed, ranking_section, verdict_section, versus_section
from launch.report.files import copy_cells, write_all_results, write_summary_csv
from launch.report.html import as_code, as_text, to_html
from launch.report.memory import memory_section, mib, study_column, table
from launch.report.runs import COMMAND_FILE, CellRun, read_runs
from toolkit.log import printable

__all__ = ["main", "write_report"]

_ON_CPU = """\
> **Run on CPU. No figure below is GPU memory.** The memory columns are the tensor-byte ledger: the bytes of every
> weight, gradient, optimizer state, mask and score tensor, counted by storage. They are the same on a GPU, but a GPU
> also holds activations, workspaces and the allocator's cache, which are not here."""
_SYNTHETIC = "> **SYNTHETIC images**: accuracy says nothing about photographs."


def write_report(runs: Sequence[CellRun], out: Path, source: Path, *, brief: bool = False) -> None:
    """Write the report of `runs` into `out`; `brief`: only report.md, its pictures and summary.json."""
    from launch.report.pictures import draw_all

    out.mkdir(parents=True, exist_ok=True)
    groups = group_by_method(runs)
    pictures = draw_all(groups, out)
    summary = {
        "schema": "study-summary/1",
        "environment": environment(runs),
        "cells": [cell_summary(run) for run in runs],
        "methods": [method_summary(name, members) for name, members in groups.items()],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = "\n".join(_markdown(runs, groups, pictures, source, out, brief=brief)) + "\n"
    (out / "report.md").write_text(text)
    if brief:
        return
    write_summary_csv(groups, out / "summary.csv")
    write_all_results(runs, out / "all_results.json")
    copy_cells(runs, out / "cells")
    (out / "report.html").write_text(to_html(text, out, alternative_texts(groups, pictures)))


def alternative_texts(groups: dict[str, list[CellRun]], pictures: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What each picture shows, for those who do not see it; the figures themselves are in the tables."""
    names = f"{len(groups)} methods" if len(groups) > 8 else ", ".join(groups)
    return {name: f"Chart: {caption}. Shown: {names}. The figures are in the tables." for name, caption in pictures}


def group_by_method(runs: Sequence[CellRun]) -> dict[str, list[CellRun]]:
    """Runs that differ in the seed only. Groups of one label are told apart by the settings in which they differ.

    A setting that most of them share is not in a name. Raises ValueError where two runs differ in nothing.
    """
    groups: dict[tuple[str, str], list[CellRun]] = {}
    for run in runs:
        groups.setdefault((run.label, json.dumps(run.settings, sort_keys=True)), []).append(run)
    named = {}
    for (label, _), members in groups.items():
        seeds: dict[int, CellRun] = {}
        for run in members:
            other = seeds.setdefault(run.metrics["seed"], run)
            if other is not run:
                raise ValueError(
                    f"{other.folder} and {run.folder} are the same run (settings and seed); move one elsewhere"
                )
        rivals = [other[0].settings for (name, _), other in groups.items() if name == label]
        mine = members[0].settings
        unusual = [key for key in sorted(mine) if not _is_usual(mine[key], [rival.get(key) for rival in rivals])]
        shown = [f"{key}={'none' if mine[key] in ('', None) else mine[key]}" for key in unusual]
        named[" ".join([label, *shown])] = members
    assert len(named) == len(groups), "two groups of one name"
    return dict(sorted(named.items(), key=lambda item: (_place(item[1][0]), item[0])))


def _place(run: CellRun) -> tuple[bool, str, str, float]:
    """Order of the tables that rank nothing: ours first, then by optimizer, method and sparsity."""
    return run.optimizer not in OURS, run.optimizer, "" if run.method == "none" else run.method, run.sparsity


def _is_usual(value: Any, values: Sequence[Any]) -> bool:
    """Whether `value` occurs more often among `values` than any other."""
    return all(values.count(value) > values.count(other) for other in values if other != value)


def environment(runs: Sequence[CellRun]) -> dict[str, Any]:
    """What all runs share, and every value where they do not."""
    keys = (
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
    shared: dict[str, Any] = {}
    for key in keys:
        values = [run.metrics[key] for run in runs]
        shared[key] = values[0] if all(value == values[0] for value in values) else values
    shared["seeds"] = sorted({run.metrics["seed"] for run in runs})
    return shared


def cell_summary(run: CellRun) -> dict[str, Any]:
    """One run's line of summary.json."""
    ledger, peak = run.memory["ledger"], run.memory["ledger_peak"]
    keys = (
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
    return {
        "name": run.folder.name,
        **{key: run.metrics[key] for key in keys},
        "lr": run.lr,
        "weight_decay": run.arguments["weight_decay"],
        "train_s": sum(run.metrics["epoch_s"]),
        "optimizer_end_bytes": ledger["optimizer_bytes"],
        "optimizer_peak_bytes": peak["optimizer_bytes"],
        "ledger_end_bytes": ledger["total_bytes"],
        "ledger_peak_bytes": peak["total_bytes"],
        "optimizer_bytes_per_weight": ledger["optimizer_bytes"] / (run.row("weights") / 4),
        "ledger_rows_end_bytes": {row["name"]: row["measured_bytes"] for row in ledger["rows"]},
        "peak_of_a_step_bytes": {name: phase["total_bytes"] for name, phase in run.memory["phases"].items()},
        "allocated_peak_bytes": run.memory["reduced"]["peaks.life.allocated_peak_bytes"]["max"],
        **study_column(run),
    }


def method_summary(name: str, members: Sequence[CellRun]) -> dict[str, Any]:
    """Mean and standard deviation (None for one seed) over a method's seeds."""
    finals = [run.metrics["final_top1"] for run in members]
    return {
        "method": name,
        "seeds": [run.metrics["seed"] for run in members],
        "final_top1_mean": statistics.mean(finals),
        "final_top1_stdev": statistics.stdev(finals) if len(finals) > 1 else None,
    }


def _sparsity(members: Sequence[CellRun]) -> str:
    if members[0].method == "none":  # a weight that is 0 by chance is no pruning
        return "–"
    return ", ".join(sorted({f"{100 * run.metrics['final_sparsity']:.2f} %" for run in members}))


def _markdown(
    runs: Sequence[CellRun],
    groups: dict[str, list[CellRun]],
    pictures: Sequence[tuple[str, str]],
    source: Path,
    out: Path,
    *,
    brief: bool,
) -> list[str]:
    shared, groups = environment(runs), {as_text(name): members for name, members in groups.items()}
    versions = "; ".join(
        dict.fromkeys(", ".join(f"{key} {value}" for key, value in run.metrics["versions"].items()) for run in runs)
    )
    seeds, command = shared["seeds"], f"python -m launch.report {source} --out {out}{' --brief' if brief else ''}"
    one_seed = (
        " One seed: differences of a point or so are noise, and no rank is claimed."
        if len(seeds) == 1
        else " Accuracy is mean ± standard deviation over the seeds."
    )
    return [
        f"# {as_text(out.name)}: {_said(shared['model'])} on {_said(shared['dataset'])}",
        "",
        *([_ON_CPU] if any(run.metrics["device_type"] == "cpu" for run in runs) else []),
        *(["", _SYNTHETIC] if shared["dataset_synthetic"] else []),
        "",
        f"Data: {_said(shared['dataset_note'] or shared['dataset'])}. Evaluated on its split "
        f"{_said([run.arguments['val_split'] for run in runs])}. Hardware: {_said(shared['world_size'])} "
        f"ranks on {_said(shared['device'])}. Versions: {as_text(versions)}. "
        f"Seeds: {', '.join(map(as_text, seeds))}.{one_seed} "
        f"Global batch {_said(shared['global_batch_size'])}, {_said(shared['epochs'])} epochs, precision "
        f"{_said(shared['mixed_precision'])}.",
        "",
        *verdict_section(groups),
        *ranking_section(groups),
        *versus_section(groups),
        *_speed_section(groups),
        *memory_section(groups),
        *[line for name, caption in pictures for line in (f"![{caption}]({name})", "", f"*{caption}*", "")],
        "## Settings",
        "",
        *table(
            ["method", "lr", "weight decay", "global batch", "epochs", "schedule", "run"],
            [
                [
                    name,
                    f"{run.lr:g}",
                    f"{run.arguments['weight_decay']:g}",
                    as_text(run.metrics["global_batch_size"]),
                    as_text(run.metrics["epochs"]),
                    as_text(run.schedule_note),
                    as_text(run.folder.name)
                    if brief
                    else f"[{as_text(run.folder.name)}](cells/{quote(run.folder.name, safe='=,+')}/args.yaml)",
                ]
                for name, (run, *_) in groups.items()
            ],
        ),
        "",
        f"{_runs_made_by(source)} Made by {as_code(command)}.",
    ]


def _said(value: Any) -> str:
    """A value that all runs share, or each one that occurs."""
    return as_text(" or ".join(sorted({str(one) for one in value})) if isinstance(value, list) else value)


def _runs_made_by(source: Path) -> str:
    command = source / COMMAND_FILE
    if not command.exists():
        return f"Runs: the folders in {as_code(source)}."
    return f"Runs: {as_code(command.read_text().strip())}."


def _speed_section(groups: dict[str, list[CellRun]]) -> list[str]:
    return [
        "## Speed",
        "",
        *table(
            ["method", "images/s", "training s"],
            [
                [
                    name,
                    f"{statistics.mean(run.metrics['images_per_sec'] for run in members):.0f}",
                    f"{statistics.median(sum(run.metrics['epoch_s']) for run in members):.0f}",
                ]
                for name, members in groups.items()
            ],
        ),
        "",
        "Mean and median over the runs as they came, others beside them or not: a rough guide. Steps are timed against "
        "each other in results/bench.",
        "",
    ]


def _print_table(groups: dict[str, list[CellRun]]) -> None:
    width = max(len(name) for name in groups)
    lines = [f"{'method':<{width}}  {'top-1 %':>14}  {'sparsity':>9}  {'optimizer+pruning MiB (end)':>28}"]
    for name, members in groups.items():
        size = mib(members[0].memory["ledger"]["optimizer_bytes"])
        sparsity = _sparsity(members)
        lines.append(f"{name:<{width}}  {accuracy(list(by_seed(members).values())):>14}  {sparsity:>9}  {size:>28}")
    print(printable("\n".join(lines)))  # noqa: T201


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and write the report."""
    parser = argparse.ArgumentParser(prog="python -m launch.report", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of run folders, for example runs/demo")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report, for example results/demo")
    parser.add_argument("--brief", action="store_true", help="only report.md, its pictures and summary.json")
    options = parser.parse_args(argv)
    try:
        runs, left_out = read_runs(options.runs)
        write_report(runs, options.out, options.runs, brief=options.brief)
    except ValueError as error:
        parser.exit(2, f"launch.report: error: {error}\n")
    for name in left_out:
        print(printable(f"left out, not complete: {name}"), file=sys.stderr)  # noqa: T201
    _print_table(group_by_method(runs))
    print(f"\n{options.out / 'report.md'}", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
