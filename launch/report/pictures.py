"""The pictures of a report. Axes start at 0 where lengths are compared, and name their source and unit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from launch.png import save_png
from launch.report.pictures_study import (
    COLOURS,
    STYLES,
    Lines,
    accuracy_over_epochs,
    accuracy_over_sparsity,
    as_lines,
    legend,
    pareto,
    range_in_colour,
    sparsity_over_steps,
)
from launch.report.runs import DENSE, CellRun, Groups, top1
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
_Picture = tuple[Callable[[Figure, Lines], None], Lines, tuple[float, float], str]


def draw_all(groups: Groups, out: Path) -> list[tuple[str, str]]:
    """Draw every picture into `out`; returns (file name, caption) in the report's order."""
    rcParams.update(_STYLE)
    pictures = _pictures(as_lines(groups))
    for name, (draw, data, size, caption) in pictures.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, data)
        figure.suptitle(caption, fontsize=11)
        save_png(figure, out / name)
    return [(name, caption) for name, (*_, caption) in pictures.items()]


def _pictures(lines: Lines) -> dict[str, _Picture]:
    """What there is to be seen in these runs, by file name."""
    every = _runs(lines)
    where = (
        "tensor-byte ledger, one rank"
        if every[0].metrics["device_type"] != "cpu"
        else "NO GPU: tensor-byte ledger of one CPU rank"
    )
    levels, few = len({line.sparsity for line in lines}), _few(lines)
    logged = sorted({run.metrics["seed"] for run in _runs(few) if run.timeline})
    seeds = f"seed{'s' * (len(logged) > 1)} {' '.join(map(str, logged))}" if len(logged) < 6 else f"{len(logged)} seeds"
    pictures: dict[str, _Picture] = {
        "pareto.png": (
            pareto,
            lines,
            (8.5, 5),
            "Accuracy against state bytes at the peak; the line is the best for its bytes",
        ),
        "memory_timeline.png": (_timeline, few, (7.5, 6.5), f"Memory over training, {seeds} ({where})"),
        "accuracy.png": (
            accuracy_over_epochs,
            lines,
            (max(7.5, 3.2 * levels), 4.8),
            "Validation top-1 over epochs, mean and spread over seeds",
        ),
        "sparsity.png": (sparsity_over_steps, lines, (7.5, 4.5), "Zeros over training"),
        "accuracy_vs_sparsity.png": (
            accuracy_over_sparsity,
            lines,
            (7.5, 5),
            "Final top-1 against sparsity, spread over seeds",
        ),
        "memory_vs_accuracy.png": (
            _memory_accuracy,
            few,
            (7.5, 4.5),
            f"Memory against final top-1, mean over seeds ({where})",
        ),
        "ledger.png": (_ledger, few, (8.5, 4.5), f"Who owns the memory at the end, mean over seeds ({where})"),
        "ledger_peak.png": (
            _peak_ledger,
            few,
            (8.5, 6.5),
            "A step's peak at final sparsity: predicted and measured, rank 0, mean over seeds",
        ),
    }
    nothing_to_see = {
        "pareto.png": len(lines) == 1,
        "memory_vs_accuracy.png": len(lines) == 1,
        "accuracy_vs_sparsity.png": levels == 1,
        "memory_timeline.png": not logged,
        "sparsity.png": all(run.method == "none" for run in every),
    }
    return {name: picture for name, picture in pictures.items() if not nothing_to_see.get(name)}


def _runs(lines: Lines) -> list[CellRun]:
    return [run for line in lines for run in line.members]


def _few(lines: Lines) -> Lines:
    """What the memory pictures show: all, or of many methods the dense ones and those at the middle sparsity."""
    if len(lines) <= _MANY:
        return lines
    levels = sorted({line.sparsity for line in lines if line.sparsity and not line.grey})
    level = levels[len(levels) // 2] if levels else 0.0
    dense = [line for line in lines if line.members[0].method == "none" and line.members[0].optimizer in DENSE]
    return [*dense, *(line for line in lines if line.sparsity == level and not line.grey and line not in dense)][:_MANY]


def _each(lines: Lines) -> Iterator[tuple[str, CellRun, str, str]]:
    """(label, run, colour, line style) of every run; sparsities of one method differ in the style."""
    before: Counter[str] = Counter()
    for line in lines:
        style = STYLES[(STYLES.index(line.style) + before[line.name]) % len(STYLES)]
        before[line.name] += 1
        yield from ((line.group, run, line.colour, style) for run in line.members)


def _timeline(figure: Figure, lines: Lines) -> None:
    """All ranks, one line each; dotted where a phase begins, a cross where the allocator had to retry."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    begins: dict[str, int] = {}
    for label, run, colour, style in _each(lines):
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
    names: dict[int, list[str]] = {}
    for name, step in begins.items():
        names.setdefault(step, []).append(name.replace("_", " "))
    for step, here in names.items():
        for axes in (upper, lower):
            axes.axvline(step, color="#666666", linewidth=0.8, linestyle=":")
        upper.annotate(
            ", ".join(here),
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            va="bottom",  # above the frame: below it are the curves
            ha="center",
            color="#444444",
        )
    upper.set(ylabel="all tensors (MiB)", ylim=(0, None))
    lower.set(ylabel="optimizer and pruning (MiB)", xlabel="optimizer step", ylim=(0, None))
    legend(figure, [upper])


def _memory_accuracy(figure: Figure, lines: Lines) -> None:
    axes = figure.subplots()
    for line in lines:
        end, peak = (
            fmean(run.memory[ledger]["total_bytes"] / MIB for run in line.members)
            for ledger in ("ledger", "ledger_peak")
        )
        (mean, spread), colour = top1(line.members), line.colour
        axes.plot([end, peak], [mean, mean], color=colour, linewidth=1)
        axes.plot(peak, mean, "o", markerfacecolor="none", markeredgecolor=colour, markersize=12, markeredgewidth=1.5)
        axes.errorbar(end, mean, spread, fmt="o", color=colour, markersize=8, capsize=2, label=line.group)
    axes.set(xlabel="all tensors (MiB): filled = end, hollow = peak", ylabel="final top-1 (%)", xlim=(0, None))
    axes.set_ylim(range_in_colour(lines))
    legend(figure, [axes])


def _ledger(figure: Figure, lines: Lines) -> None:
    ledgers = {line.group: [run.memory["ledger"] for run in line.members] for line in lines}
    _stack(figure, {group: _mean_rows(members, "measured_bytes") for group, members in ledgers.items()})


def _peak_ledger(figure: Figure, lines: Lines) -> None:
    """Two bars a method: what was predicted and what the probed step held."""
    bars: dict[str, dict[str, float]] = {}
    for line in lines:
        every = [run.memory["phases"] for run in line.members]
        probed = [phase for of in every if (phase := of.get("final") or of.get("dense") or of.get("warm_up"))]
        predicted = [phase for phase in probed if phase["predicted_total_bytes"] is not None]
        if predicted:
            bars[f"{line.group}\npredicted"] = _mean_rows(predicted, "predicted_bytes")
        if probed:  # a compiled model is not
            bars[f"{line.group}\nmeasured"] = _mean_rows(probed, "measured_bytes")
    if bars:
        _stack(figure, bars)


def _mean_rows(ledgers: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Bytes of each row, mean over runs."""
    names = dict.fromkeys(row["name"] for ledger in ledgers for row in ledger["rows"])
    tables = [{row["name"]: row[key] for row in ledger["rows"]} for ledger in ledgers]
    return {name: fmean(rows.get(name, 0) for rows in tables) for name in names}


def _stack(figure: Figure, bars: dict[str, dict[str, float]]) -> None:
    """Horizontal bars stacked of ledger rows, from the top down; rows too thin to see are left to the tables."""
    axes = figure.subplots()
    bars = dict(reversed(bars.items()))  # an axis counts from the bottom
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
