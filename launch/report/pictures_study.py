"""Pictures of a study over seeds: accuracy over epochs and sparsities, the Pareto front, sparsity over steps.

Where there are more methods than eyes can tell apart, ours and the best of the others are drawn in colour, the rest
grey; the tables have them all.
"""

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from launch.report.accuracy import OURS, by_seed
from launch.report.runs import CellRun
from launch.report.significance import mean_and_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "STYLES",
    "accuracy_over_epochs",
    "accuracy_over_sparsity",
    "legend",
    "look",
    "pareto",
    "series",
    "sparsity_over_steps",
]

# Okabe & Ito's palette: eight colours that stay apart in the common forms of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
STYLES = ("-", "--", "-.", ":")
_GREY = "#c4c4c4"
_IN_COLOUR = 6  # without the palette's grey and its yellow
_DENSE = ("adamw", "momentum")  # what ours are without pruning
_LETTERS_AN_INCH, _LETTERS_OF_A_MARK = 16, 7  # of a legend in 8 points
Groups = Mapping[str, Sequence[CellRun]]


def _mean(members: Sequence[CellRun]) -> float:
    return mean_and_spread(list(by_seed(members).values()))[0]


def _by_name(groups: Groups) -> dict[str, dict[float, Sequence[CellRun]]]:
    """Method without its sparsity -> sparsity -> runs."""
    found: dict[str, dict[float, Sequence[CellRun]]] = {}
    for label, members in groups.items():
        found.setdefault(series(label, members), {})[members[0].sparsity] = members
    return found


def series(label: str, members: Sequence[CellRun]) -> str:
    """A group's label without the sparsity: what a line over sparsities is named."""
    return members[0].name + label.removeprefix(members[0].label)


def _grey_first(groups: Groups, looks: Mapping[str, tuple[str, str]]) -> list[tuple[str, Sequence[CellRun]]]:
    """(series, runs) of each group, those drawn grey first, so that they lie below."""
    named = [(series(label, members), members) for label, members in groups.items()]
    return sorted(named, key=lambda pair: looks[pair[0]][0] != _GREY)


def look(groups: Groups) -> dict[str, tuple[str, str]]:
    """(colour, line style) of each method name: ours, their baselines and the best on average of its sparsities in
    colour, pruned before dense.
    """
    names = _by_name(groups)
    means = {name: fmean(map(_mean, levels.values())) for name, levels in names.items()}
    ranked = sorted(names, key=lambda name: (max(names[name]) > 0, means[name]), reverse=True)
    first = [name for name in (*OURS, *_DENSE) if name in names]
    shown = [*first, *(name for name in ranked if name not in first)]
    shown = shown if len(names) <= len(COLOURS) else shown[:_IN_COLOUR]
    return {
        name: (COLOURS[shown.index(name)], STYLES[shown.index(name) // 2 % 4]) if name in shown else (_GREY, "-")
        for name in names
    }


def legend(figure: "Figure", all_axes: Sequence["Axes"], *, others: bool = False) -> None:
    """One entry a label, below the picture, where it hides nothing; `others`: some are grey."""
    if others:
        all_axes[0].plot([], [], color=_GREY, marker="o", markersize=4, linestyle="none", label="others")
    unique = {
        label: handle
        for axes in all_axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        if not label.startswith("_")
    }
    letters = _LETTERS_AN_INCH * figure.get_figwidth()
    columns = max(1, min(4, int(letters / (max(map(len, unique)) + _LETTERS_OF_A_MARK))))
    figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=columns, fontsize=8)


def _curve(run: CellRun) -> list[tuple[int, float]]:
    """(epoch from 1, top-1) of the evaluated epochs."""
    return [(int(row["epoch"]) + 1, float(row["eval_top1"])) for row in run.epochs if row["eval_top1"]]


def accuracy_over_epochs(figure: "Figure", groups: Groups) -> None:
    """A panel a sparsity; lines are means, bands standard deviations over seeds."""
    from matplotlib.ticker import MaxNLocator

    levels = sorted({members[0].sparsity for members in groups.values()})
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    looks = look(groups)
    lowest = 100.0  # of those in colour: one that collapses shall not flatten the rest
    for name, members in _grey_first(groups, looks):
        axes = panels[levels.index(members[0].sparsity)]
        colour, style = looks[name]
        tables = [_curve(run) for run in members]
        epochs = [epoch for epoch, _ in tables[0]]
        columns = [mean_and_spread([rows[i][1] for rows in tables]) for i in range(len(epochs))]
        means = [mean for mean, _ in columns]
        label = name if colour != _GREY else "_"
        axes.plot(epochs, means, color=colour, linestyle=style, marker="o", markersize=3, label=label)
        if colour != _GREY and len(members) > 1:
            low, high = zip(*[(mean - (spread or 0), mean + (spread or 0)) for mean, spread in columns], strict=True)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        lowest = min(lowest, means[len(means) // 3]) if colour != _GREY else lowest
    for axes, level in zip(panels, levels, strict=True):
        axes.set(xlabel="epoch", title=f"{100 * level:g} % sparsity" if level else "dense")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(ylabel="top-1 on validation images (%)", ylim=(max(0.0, lowest - 2), 101))
    legend(figure, list(panels), others=_GREY in {colour for colour, _ in looks.values()})


def accuracy_over_sparsity(figure: "Figure", groups: Groups) -> None:
    """Final accuracy of each method at its sparsities, with the spread over seeds as bars."""
    axes = figure.subplots()
    looks = look(groups)
    for name, levels in sorted(_by_name(groups).items(), key=lambda item: looks[item[0]][0] != _GREY):
        colour, style = looks[name]
        points = [
            (100 * level, *mean_and_spread(list(by_seed(members).values())))
            for level, members in sorted(levels.items())
        ]
        label = name if colour != _GREY else "_"
        bars = None if colour == _GREY else [spread or 0.0 for _, _, spread in points]
        axes.errorbar(
            [p[0] for p in points],
            [p[1] for p in points],
            bars,
            color=colour,
            linestyle=style,
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
        )
    axes.set(xlabel="sparsity (%)", ylabel="final top-1 (%)", ylim=_range_in_colour(groups, looks))
    legend(figure, [axes], others=_GREY in {colour for colour, _ in looks.values()})


def pareto(figure: "Figure", groups: Groups) -> None:
    """Accuracy against what optimizer and pruning keep, a mark a method and sparsity; the line is the front."""
    axes = figure.subplots()
    looks = look(groups)
    marks = dict(zip(sorted({m[0].sparsity for m in groups.values()}), itertools.cycle("osD^vP"), strict=False))
    points = []
    for name, members in _grey_first(groups, looks):
        first = members[0]
        mean, spread = mean_and_spread(list(by_seed(members).values()))
        colour, _ = looks[name]
        points.append((first.bytes_per_weight, mean))
        label = name if colour != _GREY else "_"
        axes.errorbar(
            first.bytes_per_weight,
            mean,
            None if colour == _GREY else spread,
            color=colour,
            marker=marks[first.sparsity],
            markersize=6,
            capsize=2,
            linestyle="none",
            label=label,
        )
    front, best = [], -1.0
    for size, mean in sorted(points, key=lambda point: (point[0], -point[1])):
        if mean > best:
            front.append((size, mean))
            best = mean
    axes.plot(*zip(*front, strict=True), color="#333333", linewidth=1, drawstyle="steps-post", zorder=0)
    for level, mark in marks.items():
        axes.plot([], [], mark, color="#333333", label=f"{100 * level:g} % sparsity" if level else "dense")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="optimizer state and pruning at the end (bytes a weight, logarithmic)",
        ylabel="final top-1 (%)",
        ylim=_range_in_colour(groups, looks),
    )
    legend(figure, [axes], others=_GREY in {colour for colour, _ in looks.values()})


def _range_in_colour(groups: Groups, looks: Mapping[str, tuple[str, str]]) -> tuple[float, float]:
    """An axis of accuracies that holds all that is drawn in colour, with the spread."""
    ends = []
    for name, members in _grey_first(groups, looks):
        mean, spread = mean_and_spread(list(by_seed(members).values()))
        if looks[name][0] != _GREY:
            ends += [mean - (spread or 0.0), mean + (spread or 0.0)]
    return min(ends) - 0.5, max(ends) + 0.5


def sparsity_over_steps(figure: "Figure", groups: Groups) -> None:
    """Zeros counted in the model at each epoch's end, of every pruned run; runs of one schedule lie on each other."""
    axes = figure.subplots()
    looks = look(groups)
    for name, members in _grey_first(groups, looks):
        if members[0].method == "none":
            continue
        for run in members:
            steps = [(i + 1) * run.metrics["steps_per_epoch"] for i in range(len(run.metrics["sparsity"]))]
            colour, style = looks[name]
            axes.plot(
                steps,
                [100 * share for share in run.metrics["sparsity"]],
                color=colour,
                linestyle=style,
                linewidth=1,
                label=name if colour != _GREY else "_",
            )
    axes.set(xlabel="optimizer step", ylabel="zeros / prunable weights (%)", ylim=(0, 100))
    legend(figure, [axes])
