"""The report's section on how precise moments (and weights) were: each precision against float32, paired by seed.

Accuracy, and of the final weights the share whose zeros are float32's. That is read from checkpoints, which an archive
does not have: `with_agreement` keeps it in the runs' metrics.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from launch.report.html import as_text
from launch.report.runs import CellRun, Groups, group_by_method
from launch.report.significance import compare
from toolkit.markdown import table

if TYPE_CHECKING:
    import numpy as np

_FLOAT32 = "float32"
_LOWEST = -0.3  # points that the interval's lower end has to be above
_AGREEMENT = "mask_agreement"  # in a run's metrics: another run's name -> share of prunable weights

Seeds = Mapping[int, CellRun]

_NOTE = f"""\
Final epoch, paired by seed: mean ± spread [95 % interval of the mean].
Above {_LOWEST:g}: whether the interval's lower end is.
*All* takes all pairs of its rows together, its standard error by pairs; without a precision in its name those of all
precisions of moments.
They share seeds (first weights, order of images), so pairs of one seed err alike.
By seed: the mean of each seed's pairs is one value.
Zeros as float32's: of the prunable weights, the share that is zero in both final models or in neither.
Beside it is what two float32 runs of different seeds agree to, and chance at that sparsity, s² + (1 − s)².
A dash: dense, or the checkpoints were not there."""


def _against_float32(groups: Groups) -> Iterator[tuple[Seeds, dict[str, Seeds]]]:
    """(float32's runs, row -> runs of another precision) of each method that has two seeds or more of both."""
    found: dict[str, dict[str, tuple[str, Seeds]]] = {}  # by all other settings: precision -> row, runs
    for name, members in groups.items():
        first = members[0]
        rest = {key: value for key, value in first.settings.items() if key not in ("state_dtype", "state_budget")}
        if first.has_bfloat16_weights:  # these compute in bfloat16: beside float32 weights under --amp bf16
            rest |= {"model_dtype": None, "amp": "bf16"}
        seeds = {run.metrics["seed"]: run for run in members}
        found.setdefault(json.dumps(rest, sort_keys=True), {})[first.precision or _FLOAT32] = name, seeds
    for rows in found.values():
        base = rows.pop(_FLOAT32, ("", {}))[1]
        others = {name: seeds for name, seeds in rows.values() if len(base.keys() & seeds.keys()) > 1}
        if others:
            yield base, others


def _pairs(base: Seeds, other: Seeds) -> list[tuple[CellRun, CellRun]]:
    """Runs of one seed, the other precision's first."""
    return [(other[seed], base[seed]) for seed in sorted(base.keys() & other.keys())]


def _survivors(run: CellRun) -> "np.ndarray | None":
    """Which prunable weights of the last checkpoint are not 0, (n,); None without a checkpoint or masks in it."""
    import numpy as np  # here: --help loads neither numpy nor torch

    from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint

    path = newest_checkpoint(run.folder / "checkpoints")
    if path is None:
        return None
    state = load_checkpoint(path)
    pruned = state["model"].keys() & {name for name, kept in state["optimizer"]["state"].items() if "mask" in kept}
    weights = [(state["model"][name] != 0).flatten().numpy() for name in sorted(pruned)]
    return np.concatenate(weights) if weights else None


def with_agreement(runs: Sequence[CellRun]) -> list[CellRun]:
    """The runs, with what the checkpoints tell of those that the section compares; without these, as they are."""
    found: dict[str, dict[str, float]] = {}
    for base, rows in _against_float32(group_by_method(runs)):
        survivors = {run.folder.name: _survivors(run) for seeds in (base, *rows.values()) for run in seeds.values()}
        pairs = [pair for seeds in rows.values() for pair in _pairs(base, seeds)]
        for one, other in (*pairs, *itertools.combinations(base.values(), 2)):
            mine, theirs = survivors[one.folder.name], survivors[other.folder.name]
            if mine is not None and theirs is not None:
                share = float((mine == theirs).mean())
                found.setdefault(one.folder.name, {})[other.folder.name] = share
    return [
        dataclasses.replace(run, metrics=run.metrics | {_AGREEMENT: found[run.folder.name]})
        if run.folder.name in found
        else run
        for run in runs
    ]


def _agreed(pairs: Sequence[tuple[CellRun, CellRun]]) -> str:
    """Mean over the pairs of which it is known; of two float32 runs either may have been asked."""
    shares = [
        share
        for pair in pairs
        for one, other in (pair, pair[::-1])
        if (share := one.metrics.get(_AGREEMENT, {}).get(other.folder.name)) is not None
    ]
    return _percent(fmean(shares)) if shares else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _row(name: str, pairs: Sequence[tuple[CellRun, CellRun]]) -> list[str]:
    """Name, pairs, difference and whether it is above the lowest allowed."""
    mine, base = (
        {number: run.metrics["final_top1"] for number, run in enumerate(side)} for side in zip(*pairs, strict=True)
    )
    found = compare(mine, base)
    assert found.interval is not None
    return [name, str(len(pairs)), str(found), "yes" if found.interval[0] > _LOWEST else "no"]


def _by_seed(pairs: Sequence[tuple[CellRun, CellRun]]) -> str:
    """The difference with the mean of each seed's pairs as one value."""
    of_seed: dict[int, list[tuple[CellRun, CellRun]]] = {}
    for pair in pairs:
        of_seed.setdefault(pair[0].metrics["seed"], []).append(pair)
    mine, base = (
        {seed: fmean(pair[side].metrics["final_top1"] for pair in own) for seed, own in of_seed.items()}
        for side in (0, 1)
    )
    return str(compare(mine, base))


def precision_section(groups: Groups) -> list[str]:
    """A row for each precision beside float32's; for all rows of one precision, and for all moments of an optimizer."""
    lines: list[list[str]] = []
    pooled: dict[str, list[list[tuple[CellRun, CellRun]]]] = {}
    moments: dict[str, list[list[tuple[CellRun, CellRun]]]] = {}
    for base, rows in _against_float32(groups):
        between_seeds = _agreed(list(itertools.combinations(base.values(), 2)))
        for name, seeds in rows.items():
            pairs, run = _pairs(base, seeds), next(iter(seeds.values()))
            chance = "–" if run.method == "none" else _percent(run.sparsity**2 + (1 - run.sparsity) ** 2)
            lines.append([*_row(name, pairs), "", _agreed(pairs), between_seeds, chance])
            pooled.setdefault(run.name, []).append(pairs)
            if not run.has_bfloat16_weights:
                moments.setdefault(run.name.removesuffix(f" {run.precision}"), []).append(pairs)
    if not lines:
        return []
    several = {name: rows for name, rows in moments.items() if rows not in pooled.values()}  # precisions
    for name, rows_of_it in (pooled | several).items():
        if len(rows_of_it) > 1:
            every = [pair for pairs in rows_of_it for pair in pairs]
            lines.append([*_row(f"**all {as_text(name)}**", every), _by_seed(every), "", "", ""])
    header = [
        "method",
        "pairs",
        "this − float32",
        f"above {_LOWEST:g}",
        "by seed",
        "zeros as float32's",
        "two seeds",
        "chance",
    ]
    return ["## Precision of moments and weights", "", *table(header, lines), "", _NOTE, ""]
