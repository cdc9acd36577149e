"""Pictures of a study over seeds: accuracy over epochs and sparsities, the Pareto front, sparsity over steps.

Where there are more methods than eyes can tell apart, ours and the best of the others are drawn in colour, the rest
grey; the tables have them all.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launch.report.runs import DENSE, CellRun, Groups, ours, top1
from launch.report.significance import mean_and_spread
from launch.report.verdict import dense_beside

# Okabe & Ito's palette: eight colours that stay apart in the common forms of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
STYLES = ("-", "--", "-.", ":")
_GREY = "#c4c4c4"
_IN_COLOUR = 6  # without the palette's grey and its yellow
_LEAST_BYTES = 0.01  # a weight, on a logarithmic axis, which has no place for an optimizer without state
_ASIDE = 0.4  # percentage points between methods of one sparsity
_LETTERS_AN_INCH, _LETTERS_OF_A_MARK = 16, 7  # of a legend in 8 points


@dataclass(frozen=True)
class Line:
    """A group as every picture of a report draws it: one method, one colour."""

    group: str  # its label, with the sparsity
    name: str
    members: Sequence[CellRun]
    colour: str
    style: str

    @property
    def sparsity(self) -> float:
        """Asked for, 0..1."""
        return self.members[0].sparsity

    @property
    def grey(self) -> bool:
        """Whether it is one of the others, which are not told apart."""
        return self.colour == _GREY

    @property
    def peak(self) -> float:
        """Bytes a weight of its state at the peak, where a logarithmic axis has them."""
        return max(self.members[0].peak_bytes_per_weight, _LEAST_BYTES)

    @property
    def label(self) -> str:
        """Its entry in the legend; a grey one has none."""
        return "_" if self.grey else self.name


Lines = Sequence[Line]


def series(label: str, members: Sequence[CellRun]) -> str:
    """A group's label without the sparsity: what a line over sparsities is named."""
    return members[0].name + label.removeprefix(members[0].label)


def _look(groups: Groups) -> dict[str, tuple[str, str]]:
    """(colour, line style) of each method name: in colour ours, their baselines, and the best of what was pruned to
    most sparsities, for an average over the easier ones is no lead. A method's second setting comes after all firsts.
    """
    names: dict[str, list[Sequence[CellRun]]] = {}
    for label, members in groups.items():
        names.setdefault(series(label, members), []).append(members)

    def rank(name: str) -> tuple[int, float]:
        levels = names[name]
        pruned = sum(members[0].sparsity > 0 for members in levels)
        return pruned, fmean(top1(members)[0] for members in levels)

    ranked = sorted(names, key=rank, reverse=True)
    first = [name for name in (*ours(), *DENSE) if name in names]
    shown = [*first, *(name for name in ranked if name not in first)]
    best = {names[name][0][0].name: name for name in reversed(shown)}  # of each method's settings
    shown.sort(key=lambda name: name not in best.values())
    shown = shown[:_IN_COLOUR]
    return {
        name: (COLOURS[shown.index(name)], STYLES[shown.index(name) // 2 % 4]) if name in shown else (_GREY, "-")
        for name in names
    }


def as_lines(groups: Groups) -> list[Line]:
    """Every group, those drawn grey first, so that they lie below."""
    looks = _look(groups)
    named = [(label, series(label, members), members) for label, members in groups.items()]
    return sorted(
        (Line(label, name, runs, *looks[name]) for label, name, runs in named), key=lambda line: not line.grey
    )


def _levels(lines: Lines) -> list[float]:
    return sorted({line.sparsity for line in lines})


def _by_name(lines: Lines) -> dict[str, list[Line]]:
    methods: dict[str, list[Line]] = {}
    for line in lines:
        methods.setdefault(line.name, []).append(line)
    return methods


def legend(figure: Figure, all_axes: Sequence[Axes], lines: Lines = ()) -> None:
    """One entry a label, below the picture, where it hides nothing; the grey ones of `lines` are one entry."""
    if any(line.grey for line in lines):
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


def epoch_top1(members: Sequence[CellRun]) -> dict[int, tuple[float, float | None]]:
    """Epoch, from 1 -> mean and spread over the seeds of the top-1 in percent; only epochs that were validated."""
    tables = [[row for row in run.epochs if row["eval_top1"]] for run in members]
    return {
        int(row["epoch"]) + 1: mean_and_spread([float(rows[i]["eval_top1"]) for rows in tables])
        for i, row in enumerate(tables[0])
    }


def accuracy_over_epochs(figure: Figure, lines: Lines) -> None:
    """A panel a sparsity; lines are means, bands standard deviations over seeds."""
    levels = _levels(lines)
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    lowest, highest = 100.0, 0.0  # of those in colour: one that collapses shall not flatten the rest
    for line in lines:
        axes = panels[levels.index(line.sparsity)]
        curve = epoch_top1(line.members)
        epochs, columns = list(curve), curve.values()
        means = [mean for mean, _ in columns]
        axes.plot(epochs, means, color=line.colour, linestyle=line.style, marker="o", markersize=3, label=line.label)
        if line.grey:
            continue
        lowest = min(lowest, *means[(len(means) - 1) // 3 :])  # not the first epochs, which start low
        highest = max(highest, *(mean + (spread or 0) for mean, spread in columns))
        if len(line.members) > 1:
            low, high = zip(*[(mean - (spread or 0), mean + (spread or 0)) for mean, spread in columns], strict=True)
            axes.fill_between(epochs, low, high, color=line.colour, alpha=0.15, linewidth=0)
    for axes, level in zip(panels, levels, strict=True):
        axes.set(xlabel="epoch", title=f"{100 * level:g} % sparsity" if level else "dense")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(ylabel="top-1 on validation images (%)", ylim=(max(0.0, lowest - 2), min(101.0, highest + 2)))
    legend(figure, list(panels), lines)


def accuracy_over_sparsity(figure: Figure, lines: Lines) -> None:
    """Final accuracy of each method at its sparsities, with the spread over seeds as bars.

    Those in colour stand side by side, or one would hide another that scores the same.
    """
    axes = figure.subplots()
    in_colour = list(dict.fromkeys(line.name for line in lines if not line.grey))
    for name, (line, *others) in _by_name(lines).items():
        aside = 0.0 if line.grey else _ASIDE * (in_colour.index(name) - (len(in_colour) - 1) / 2)
        points = sorted((100 * one.sparsity + aside, *top1(one.members)) for one in (line, *others))
        axes.errorbar(
            [share for share, _, _ in points],
            [mean for _, mean, _ in points],
            None if line.grey else [spread or 0.0 for _, _, spread in points],
            color=line.colour,
            linestyle=line.style,
            marker="o",
            markersize=4,
            capsize=2,
            label=line.label,
        )
    axes.set(xlabel="sparsity (%), methods side by side", ylabel="final top-1 (%)", ylim=range_in_colour(lines))
    legend(figure, [axes], lines)


def pareto(figure: Figure, lines: Lines) -> None:
    """Accuracy against the peak of optimizer and pruning, a mark a method and sparsity.

    Named are those in colour and on the line, the front. The band is what dense training scores, with its spread.
    """
    axes = figure.subplots()
    marks = dict(zip(_levels(lines), itertools.cycle("osD^vP"), strict=False))
    points = []
    for line in lines:
        mean, spread = top1(line.members)
        points.append((line.peak, mean))
        axes.errorbar(
            line.peak,
            mean,
            None if line.grey else spread,
            color=line.colour,
            marker=marks[line.sparsity],
            markersize=6,
            capsize=2,
            linestyle="none",
            label=line.group,
        )
    points.sort(key=lambda point: (point[0], -point[1]))
    front = [point for i, point in enumerate(points) if all(point[1] > smaller[1] for smaller in points[:i])]
    named = [line for line in lines if not line.grey or (line.peak, top1(line.members)[0]) in front]
    # From a power of two to a power of two, so that both ends have a tick; the front holds for all that is larger.
    least, most = (2.0 ** direction(math.log2(points[i][0])) for i, direction in ((0, math.floor), (-1, math.ceil)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(least / 1.1, most * 1.1)
    front.append((most * 1.1, front[-1][1]))
    axes.plot(*zip(*front, strict=True), color="#333333", linewidth=1, drawstyle="steps-post", zorder=0)
    groups = {line.group: line.members for line in lines}
    dense = dense_beside(groups)
    mean, spread = top1(groups[dense]) if dense else (0.0, None)
    if spread:
        axes.axhspan(mean - spread, mean + spread, color="#dddddd", zorder=-1, label=f"{dense} ± its spread")
    for level, mark in marks.items():
        label = f"{100 * level:g} % sparsity" if level else "dense"
        axes.plot([], [], mark, color="#333333", linestyle="none", label=label)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="optimizer state and pruning at the peak (bytes a weight, logarithmic)",
        ylabel="final top-1 (%)",
        ylim=range_in_colour(lines),
    )
    _name_points(axes, named, points, figure.get_figwidth())
    handles, labels = axes.get_legend_handles_labels()
    shown = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label not in groups]
    figure.legend(*zip(*shown, strict=True), loc="outside lower center", ncols=5, fontsize=8)


def _name_points(axes: Axes, lines: Lines, marks: Sequence[tuple[float, float]], width_inches: float) -> None:
    """Each point's label at its right or left, or a few lines off where both are taken: none hides another or one
    of the `marks`, which are in the units of the axes.

    Boxes are (left, right, height of the middle) in shares of the axes; a letter of 7 pt is 0.6 as wide as high.
    """
    letter, row, gap = 0.6 * 7 / 72 / (0.9 * width_inches), 0.035, 0.018
    to_shares = axes.transData + axes.transAxes.inverted()
    places = [to_shares.transform((line.peak, top1(line.members)[0])) for line in lines]
    taken = [(x - gap / 2, x + gap / 2, y) for x, y in map(to_shares.transform, marks)]
    for line, (x, y) in sorted(zip(lines, places, strict=True), key=lambda pair: len(pair[0].group)):
        width = letter * len(line.group)
        lifts = sorted(range(-12, 13), key=abs)
        boxes = [(left, left + width, y + row * lift) for lift in lifts for left in (x + gap, x - gap - width)]
        free = (box for box in boxes if _is_free(box, taken, row))
        box = next(free, boxes[0])
        taken.append(box)
        side = "left" if box[0] > x else "right"
        axes.annotate(
            line.group,
            (x, y),
            (box[0] if side == "left" else box[1], box[2]),
            xycoords="axes fraction",
            fontsize=7,
            ha=side,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # on the front's line it stays readable
            arrowprops={
                "arrowstyle": "-",
                "color": line.colour,
                "linewidth": 0.5,
                "relpos": (0 if side == "left" else 1, 0.5),
            },
        )


def _is_free(box: tuple[float, float, float], taken: Sequence[tuple[float, float, float]], row: float) -> bool:
    """Whether a label lies within the axes and on no other."""
    inside = box[0] >= 0 and box[1] <= 1 and row / 2 <= box[2] <= 1 - row / 2
    return inside and all(box[1] <= left or box[0] >= right or abs(box[2] - y) >= row for left, right, y in taken)


def range_in_colour(lines: Lines) -> tuple[float, float]:
    """An axis of accuracies that holds all that is drawn in colour, with the spread and room for the marks."""
    shown = [top1(line.members) for line in lines if not line.grey]
    low, high = min(mean - (spread or 0.0) for mean, spread in shown), max(m + (s or 0.0) for m, s in shown)
    room = max(0.5, 0.05 * (high - low))
    return low - room, high + room


def sparsity_over_steps(figure: Figure, lines: Lines) -> None:
    """Zeros counted in the model at each epoch's end, of every pruned run; runs of one schedule lie on each other."""
    axes = figure.subplots()
    for line in lines:
        for run in line.members if line.members[0].method != "none" else ():
            steps = [(i + 1) * run.metrics["steps_per_epoch"] for i in range(len(run.metrics["sparsity"]))]
            shares = [100 * share for share in run.metrics["sparsity"]]
            axes.plot(steps, shares, color=line.colour, linestyle=line.style, linewidth=1, label=line.label)
    axes.set(xlabel="optimizer step", ylabel="zeros / prunable weights (%)", ylim=(0, 100))
    legend(figure, [axes])
