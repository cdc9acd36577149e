"""The report of a study: its text, and all files around it."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from launch.report.accuracy import accuracy, ranking_section, verdict_section, versus_section
from launch.report.archive import RUNS_FILE, unpack, write_runs
from launch.report.files import environment, original_result, summary, summary_csv
from launch.report.html import as_code, as_text, to_html
from launch.report.memory import memory_section
from launch.report.runs import CellRun, Groups, group_by_method
from toolkit.files import write_atomically, write_json
from toolkit.markdown import mib, page, table

_ON_CPU = """\
> **Run on CPU. No figure below is GPU memory.** The memory columns are the tensor-byte ledger: the bytes of every
> weight, gradient, optimizer state, mask and score tensor, counted by storage. They are the same on a GPU, but a GPU
> also holds activations, workspaces and the allocator's cache, which are not here."""
_SYNTHETIC = "> **SYNTHETIC images**: accuracy says nothing about photographs."


def write_report(runs: Sequence[CellRun], out: Path, source: Path, *, brief: bool = False) -> None:
    """Write the report of `runs` into the folder `out`, or its tables into a file `out` that ends in .md.

    `brief`: only report.md, its pictures, summary.json and the runs.
    """
    from launch.report.pictures import draw_all

    groups, made_by = group_by_method(runs), _made_by(runs, source, out, brief)
    if out.suffix == ".md":
        write_atomically(out, page(*_markdown(runs, groups, [], out), made_by))
        return
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(groups, out)
    unpack_again = as_code(f"python -m launch.report {out / RUNS_FILE} --unpack FOLDER")
    kept = f"Every run's settings, metrics and memory are in {RUNS_FILE}; {unpack_again} makes folders of it again."
    text = page(*_markdown(runs, groups, pictures, out), kept, "", made_by)
    write_atomically(out / "report.md", text)
    write_json(out / "summary.json", summary(runs, groups), indent=1)
    write_runs(runs, out / RUNS_FILE)
    if brief:
        return
    write_atomically(out / "summary.csv", summary_csv(groups))
    write_json(out / "all_results.json", [original_result(run) for run in runs])
    unpack(runs, out / "cells")
    write_atomically(out / "report.html", to_html(text, out, _alternative_texts(groups, pictures)))


def _alternative_texts(groups: Groups, pictures: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What each picture shows, for those who do not see it; the figures themselves are in the tables."""
    names = f"{len(groups)} methods" if len(groups) > 8 else ", ".join(groups)
    return {name: f"Chart: {caption}. Shown: {names}. The figures are in the tables." for name, caption in pictures}


def _markdown(runs: Sequence[CellRun], groups: Groups, pictures: Sequence[tuple[str, str]], out: Path) -> list[str]:
    shared, groups = environment(runs), {as_text(name): members for name, members in groups.items()}
    return [
        f"# {as_text(out.name.removesuffix('.md'))}: {_said(shared['model'])} on {_said(shared['dataset'])}",
        "",
        *([_ON_CPU] if any(run.metrics["device_type"] == "cpu" for run in runs) else []),
        *(["", _SYNTHETIC] if shared["dataset_synthetic"] else []),
        "",
        _circumstances(runs, shared),
        "",
        *verdict_section(groups),
        *ranking_section(groups),
        *versus_section(groups),
        *_speed_section(groups),
        *memory_section(groups),
        *[line for name, caption in pictures for line in (f"![{caption}]({name})", "", f"*{caption}*", "")],
        *_settings_section(groups),
    ]


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


def _made_by(runs: Sequence[CellRun], source: Path, out: Path, brief: bool) -> str:
    runs_from = as_code(runs[0].made_by) if runs[0].made_by else f"those in {as_code(source)}"
    command = f"python -m launch.report {source} --out {out}{' --brief' if brief else ''}"
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
        "Mean and median over the runs as they came, others beside them or not: a rough guide. Steps are timed against "
        "each other in results/bench.",
        "",
    ]


def _settings_section(groups: Groups) -> list[str]:
    return [
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
                    as_text(run.folder.name),
                ]
                for name, (run, *_) in groups.items()
            ],
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
