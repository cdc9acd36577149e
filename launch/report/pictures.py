"""The pictures of a report. Axes start at 0 where lengths are compared, and name their source and unit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from launch.report.pictures_study import (
    COLOURS,
    DENSE,
    STYLES,
    accuracy_over_epochs,
    accuracy_over_sparsity,
    legend,
    look,
    pareto,
    series,
    sparsity_over_steps,
)
from launch.report.runs import CellRun, Groups, by_level
from toolkit.markdown import MIB

_MANY = 8  # methods; beyond, the memory pictures show ours and the best of the others at one sparsity
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "text.parse_math": False,  # names are others' text
}
# What draws it, of which runs, size in inches, caption.
_Picture = tuple[Callable[[Figure, Groups], None], Groups, tuple[float, float], str]


def draw_all(groups: Groups, out: Path) -> list[tuple[str, str]]:
    """Draw every picture into `out`; returns (file name, caption) in the report's order."""
    rcParams.update(_STYLE)
    pictures = _pictures(groups)
    for name, (draw, data, size, caption) in pictures.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, data)
        figure.suptitle(caption, fontsize=11)
        figure.savefig(out / name, dpi=130, metadata={"Software": None})
    return [(name, caption) for name, (*_, caption) in pictures.items()]


def _pictures(groups: Groups) -> dict[str, _Picture]:
    """What there is to be seen in these runs, by file name."""
    every = [run for members in groups.values() for run in members]
    where = (
        "tensor-byte ledger, one rank"
        if every[0].metrics["device_type"] != "cpu"
        else "NO GPU: tensor-byte ledger of one CPU rank"
    )
    levels, few = len(by_level(groups)), _few(groups)
    pictures: dict[str, _Picture] = {
        "accuracy.png": (
            accuracy_over_epochs,
            groups,
            (max(7.5, 3.2 * levels), 4.8),
            "Validation top-1 over epochs, mean and spread over seeds",
        ),
        "accuracy_vs_sparsity.png": (
            accuracy_over_sparsity,
            groups,
            (7.5, 5),
            "Final top-1 against sparsity, spread over seeds",
        ),
        "pareto.png": (pareto, groups, (7.5, 5), "Accuracy against state bytes; the line is the Pareto front"),
        "memory_vs_accuracy.png": (_memory_accuracy, few, (7.5, 4.5), f"Memory against final top-1 ({where})"),
        "memory_timeline.png": (_timeline, few, (7.5, 6.5), f"Memory over training ({where})"),
        "ledger.png": (_ledger, few, (8.5, 4.5), f"Who owns the memory at the end of training ({where})"),
        "ledger_peak.png": (
            _peak_ledger,
            few,
            (8.5, 6.5),
            "A step's peak at final sparsity: predicted and measured, rank 0",
        ),
        "sparsity.png": (sparsity_over_steps, groups, (7.5, 4.5), "Sparsity over steps"),
    }
    nothing_to_see = {
        "accuracy_vs_sparsity.png": levels == 1,
        "memory_timeline.png": not any(run.timeline for members in few.values() for run in members),
        "sparsity.png": all(run.method == "none" for run in every),
    }
    return {name: picture for name, picture in pictures.items() if not nothing_to_see.get(name)}


def _few(groups: Groups) -> Groups:
    """The groups that the memory pictures show: all, or of many methods one seed each at the middle sparsity."""
    if len(groups) <= _MANY:
        return groups
    levels = [level for level in by_level(groups) if level]
    level = levels[len(levels) // 2] if levels else 0.0
    looks = look(groups)
    one = {label: members[:1] for label, members in groups.items()}
    dense = {n: m for n, m in one.items() if m[0].method == "none" and m[0].optimizer in DENSE}
    at_level = {n: m for n, m in one.items() if m[0].sparsity == level and looks[series(n, m)][0] in COLOURS}
    return dict(list({**dense, **at_level}.items())[:_MANY])


def _each(groups: Groups) -> Iterator[tuple[str, CellRun, str, str]]:
    """(label, run, colour, line style) of every run."""
    for i, (label, members) in enumerate(groups.items()):
        for run in members:
            yield label, run, COLOURS[i % 8], STYLES[i // 2 % 4]


def _timeline(figure: Figure, groups: Groups) -> None:
    """All ranks, one line each; dotted where a phase begins, a cross where the allocator had to retry."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    begins: dict[str, int] = {}
    for label, run, colour, style in _each(groups):
        for rank in dict.fromkeys(row["rank"] for row in run.timeline):
            rows = [row for row in run.timeline if row["rank"] == rank]
            steps = [int(row["step"]) for row in rows]
            for axes, key in ((upper, "ledger_bytes"), (lower, "optimizer_bytes")):
                sizes = [int(row[key]) / MIB for row in rows]
                axes.plot(steps, sizes, color=colour, linestyle=style, label=label)
            retried = [i for i in range(1, len(rows)) if rows[i]["alloc_retries"] != rows[i - 1]["alloc_retries"]]
            heights = [int(rows[i]["ledger_bytes"]) / MIB for i in retried]
            upper.plot([steps[i] for i in retried], heights, "x", color=colour)
        for name, phase in run.phase_steps().items():
            begins.setdefault(name, phase)
    for name, step in begins.items():
        for axes in (upper, lower):
            axes.axvline(step, color="#666666", linewidth=0.8, linestyle=":")
        upper.annotate(
            name.replace("_", " "),
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            va="top",
            ha="right",
            color="#444444",
        )
    upper.set(ylabel="all tensors (MiB)", ylim=(0, None))
    lower.set(ylabel="optimizer and pruning (MiB)", xlabel="optimizer step", ylim=(0, None))
    legend(figure, [upper])


def _memory_accuracy(figure: Figure, groups: Groups) -> None:
    axes = figure.subplots()
    for label, run, colour, _ in _each(groups):
        end, peak = run.memory["ledger"]["total_bytes"] / MIB, run.memory["ledger_peak"]["total_bytes"] / MIB
        top1 = run.metrics["final_top1"]
        axes.plot([end, peak], [top1, top1], color=colour, linewidth=1)
        axes.plot(peak, top1, "o", markerfacecolor="none", markeredgecolor=colour, markersize=12, markeredgewidth=1.5)
        axes.plot(end, top1, "o", color=colour, markersize=8, label=label)
    axes.set(xlabel="all tensors (MiB): filled = end, hollow = peak", ylabel="final top-1 (%)", xlim=(0, None))
    results = [run.metrics["final_top1"] for members in groups.values() for run in members]
    axes.set_ylim(max(0.0, min(results) - 1.0), min(100.2, max(results) + 1.0))
    legend(figure, [axes])


def _ledger(figure: Figure, groups: Groups) -> None:
    bars = {
        label: {row["name"]: row["measured_bytes"] for row in members[0].memory["ledger"]["rows"]}
        for label, members in reversed(list(groups.items()))  # the last in the list is drawn on top
    }
    _stack(figure, bars)


def _peak_ledger(figure: Figure, groups: Groups) -> None:
    """Two bars a method: what was predicted and what the probed step held."""
    bars: dict[str, dict[str, int]] = {}
    for label, members in reversed(list(groups.items())):
        phases = members[0].memory["phases"]
        phase = phases.get("final") or phases.get("dense") or phases.get("warm_up")
        if phase is None:
            continue  # a compiled model is not probed
        bars[f"{label}\nmeasured"] = {row["name"]: row["measured_bytes"] for row in phase["rows"]}
        if phase["predicted_total_bytes"] is not None:
            bars[f"{label}\npredicted"] = {row["name"]: row["predicted_bytes"] for row in phase["rows"]}
    if bars:
        _stack(figure, bars)


def _stack(figure: Figure, bars: dict[str, dict[str, int]]) -> None:
    """Horizontal bars stacked of ledger rows, from the bottom up; rows too thin to see are left to the tables."""
    axes = figure.subplots()
    totals = [sum(rows.values()) / MIB for rows in bars.values()]
    colours = iter((*COLOURS, "#882255", "#332288", "#44AA99", "#DDCC77", "#AA4499", "#661100"))
    left = [0.0] * len(bars)
    for row in dict.fromkeys(name for rows in bars.values() for name in rows):
        sizes = [rows.get(row, 0) / MIB for rows in bars.values()]
        if max(sizes) < 0.002 * max(totals):
            continue
        axes.barh(list(bars), sizes, left=left, label=row, color=next(colours), edgecolor="white", linewidth=0.5)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for position, total in enumerate(totals):
        axes.text(total, position, f" {total:.1f}", va="center", fontsize=9)
    axes.set(xlabel="MiB", xlim=(0, 1.1 * max(totals)))
    axes.grid(axis="y", visible=False)
    legend(figure, [axes])
