"""What the page's charts are drawn from: a row a method and sparsity, as JSON; page/page.js draws it."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any
from urllib.parse import quote

from launch.report.pictures_study import STYLES, Line, as_lines, epoch_top1, range_in_colour
from launch.report.runs import CellRun, Groups, top1
from launch.report.verdict import dense_beside, picks
from toolkit.log import printable

CHARTS = ("pareto.png", "memory_timeline.png", "accuracy.png", "sparsity.png")  # pictures that the page draws itself
_POINTS = 60  # of a memory timeline


def chart_data(groups: Groups) -> dict[str, Any]:
    """Rows (bytes a weight, accuracies in percent, shares in percent), the band of dense training, axis and levels."""
    lines = as_lines(groups)
    taken = {pick.name for pick in picks(groups)}
    dense = dense_beside(groups)
    mean, spread = top1(groups[dense]) if dense else (0.0, None)
    low, high = range_in_colour(lines)
    return {
        "rows": [_row(line, line.group in taken) for line in lines],
        "levels": sorted({line.sparsity for line in lines}),
        "range": (low, max(high, *(top1(line.members)[0] for line in lines))),
        "band": {"name": printable(dense), "low": mean - spread, "high": mean + spread} if spread else None,
    }


def _row(line: Line, taken: bool) -> dict[str, Any]:
    first = line.members[0]
    curve = epoch_top1(line.members)
    return {
        "label": printable(line.group),
        "name": printable(line.name),
        "level": line.sparsity,
        "colour": None if line.grey else line.colour,
        "dash": STYLES.index(line.style),
        "pick": taken,
        "top1": top1(line.members),
        "peak": first.peak_bytes_per_weight,
        "place": line.peak,
        "end": first.bytes_per_weight,
        "settings": {name: printable(value) for name, value in first.main_settings.items()},
        "runs": [(run.metrics["seed"], f"cells/{quote(run.folder.name, safe='')}/") for run in line.members],
        "accuracy": _rounded([(epoch, mean, spread) for epoch, (mean, spread) in curve.items()]),
        "floor": [mean for mean, _ in curve.values()][len(curve) // 3],
        "sparsity": _sparsity(line.members),
        "memory": _memory(line.members),
    }


def _sparsity(members: Sequence[CellRun]) -> list[list[float | None]]:
    """(epoch, percent of zeros, mean over seeds) each."""
    tables = [run.metrics["sparsity"] for run in members]
    return _rounded([(epoch + 1, 100 * fmean(shares)) for epoch, shares in enumerate(zip(*tables, strict=False))])


def _memory(members: Sequence[CellRun]) -> list[list[float | None]]:
    """(step, bytes a weight of optimizer and pruning on rank 0) each, of the first seed whose timeline was kept."""
    run = next((run for run in members if run.timeline), members[0])
    rows = [row for row in run.timeline if row["rank"] == run.timeline[0]["rank"]]
    kept = [row for i, row in enumerate(rows) if i % (len(rows) // _POINTS + 1) == 0 or row is rows[-1]]
    return _rounded([(int(row["step"]), int(row["optimizer_bytes"]) / run.weights) for row in kept])


def _rounded(points: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[None if value is None else round(value, 3) for value in point] for point in points]


def as_json(data: dict[str, Any]) -> str:
    """`data` for a script element: no text in it can end the element or open another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&"})
