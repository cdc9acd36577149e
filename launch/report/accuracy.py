"""The report's sections on accuracy: the answer in a minute, the ranking at each sparsity, exactness, cost."""

from collections.abc import Sequence

from launch.report.runs import CellRun, Groups, by_level, by_seed, ours, top1
from launch.report.significance import Difference, compare, rank_ranges
from toolkit.markdown import table

_LARGEST_LOSS = 1.0  # points that saved bytes may cost: a row that scatters widely is not near the best for that

_RANK_NOTE = """\
Final epoch; mean ± standard deviation over the seeds. The difference is paired by seed: mean ± spread [95 % interval of
the mean]. A rank is the range that is left open when all pairs of the table are compared together (Holm, 5 %)."""


_ADVICE_NOTE = """\
**Use**: the fewest bytes among the highest mean and all rows at most a point below it, inside the paired spread and not
beyond noise. Bytes a weight: what optimizer and pruning keep at the end of training, beside the weights themselves.
Differences are paired over the seeds both rows have, so they need not be the difference of the means beside them: mean
± spread [95 % interval of the mean]."""
_OURS_NOTE = """\
The best of ours where there are several. Other rows are those of all optimizers but our two; behind or ahead by more
than the paired spread. The best of many rows is in part the luckiest, and one of twenty true draws looks beyond noise.
The ranks below allow for that; with many rows and three seeds they can tell hardly any apart."""


def accuracy(members: Sequence[CellRun], which: str = "final") -> str:
    """Mean ± spread of the final or the best epoch's top-1, or the one value."""
    mean, spread = top1(members, which)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _level_name(sparsity: float) -> str:
    return f"{100 * sparsity:g} % sparsity" if sparsity else "Dense"


def _inside(best: Sequence[CellRun], other: Sequence[CellRun]) -> bool:
    """Whether a method is so near the best, over the seeds both have, that nothing tells them apart."""
    if not by_seed(best).keys() & by_seed(other).keys():
        return False
    difference = compare(by_seed(best), by_seed(other))
    return (
        difference.seeds > 1
        and not difference.beyond_spread
        and not difference.beyond_noise
        and difference.mean <= _LARGEST_LOSS
    )


def _judged(difference: Difference) -> str:
    if difference.beyond_noise:
        return "beyond noise"
    return "beyond the paired spread, not beyond noise" if difference.beyond_spread else "inside the spread: no winner"


def verdict_section(groups: Groups) -> list[str]:
    """At each sparsity which row to use and what it costs, and how ours fare."""
    if max(len(members) for members in groups.values()) < 2:
        return []
    levels = by_level(groups)
    advice = [_advice(sparsity, level) for sparsity, level in levels.items()]
    header = [
        "at",
        "use",
        "top-1 %",
        "bytes a weight",
        "below the highest mean",
        "the highest mean",
        "its top-1 %",
        "its bytes a weight",
    ]
    lines = ["## In a minute", "", *table(header, advice), "", _ADVICE_NOTE, ""]
    mine = [row for level in levels.values() for own in ours() for row in _ours(level, own)]
    if mine:
        header = [
            "ours",
            "top-1 %",
            "bytes a weight",
            "best other row of its family",
            "its top-1 %",
            "its bytes a weight",
            "difference",
            "which is",
            "other rows: behind / inside / ahead",
        ]
        lines += [*table(header, mine), "", _OURS_NOTE, ""]
    return lines


def _advice(sparsity: float, level: Groups) -> list[str]:
    """A row of the first table: the cheapest method among those that the best is not told apart from."""
    best = max(level, key=lambda name: top1(level[name])[0])
    close = [name for name in level if name == best or _inside(level[best], level[name])]
    use = min(close, key=lambda name: (round(level[name][0].bytes_per_weight, 3), -top1(level[name])[0]))
    below = "–" if use == best else str(compare(by_seed(level[best]), by_seed(level[use])))
    return [f"**{_level_name(sparsity)}**", f"**{use}**", *_figures(level[use]), below, best, *_figures(level[best])]


def _figures(members: Sequence[CellRun]) -> list[str]:
    return [accuracy(members), f"{members[0].bytes_per_weight:.2f}"]


def _ours(level: Groups, own: str) -> list[list[str]]:
    """A row of the second table for the best row of one of ours, or none."""
    mine = [name for name in level if level[name][0].optimizer == own and level[name][0].method == "state"]
    if not mine:
        return []
    name = max(mine, key=lambda one: top1(level[one])[0])
    results = by_seed(level[name])
    others = [other for other in level if not level[other][0].is_ours]
    rivals = [other for other in others if by_seed(level[other]).keys() & results.keys()]
    of_family = [other for other in rivals if level[other][0].family == level[name][0].family]
    if not of_family:
        return []
    rival = max(of_family, key=lambda one: top1(level[one])[0])
    difference = compare(results, by_seed(level[rival]))
    found = [compare(results, by_seed(level[other])) for other in rivals]
    behind = sum(one.beyond_spread and one.mean > 0 for one in found)
    ahead = sum(one.beyond_spread and one.mean < 0 for one in found)
    tally = f"{behind} / {len(found) - behind - ahead} / {ahead}"
    return [[name, *_figures(level[name]), rival, *_figures(level[rival]), str(difference), _judged(difference), tally]]


def ranking_section(groups: Groups) -> list[str]:
    """One table a sparsity, best mean first, each row paired against adamwprune's."""
    lines = ["## Ranking", ""]
    for sparsity, level in by_level(groups).items():
        ranks = rank_ranges({name: by_seed(members) for name, members in level.items()}) if len(level) > 1 else {}
        own = [name for name in level if level[name][0].optimizer == "adamwprune"]
        base = max(own, key=lambda name: top1(level[name])[0], default=None)
        rows = []
        for name, members in sorted(level.items(), key=lambda item: -top1(item[1])[0]):
            first = members[0]
            low, high = ranks.get(name, (1, 1))
            difference = "–"
            if base is not None and name != base and by_seed(level[base]).keys() & by_seed(members).keys():
                difference = str(compare(by_seed(level[base]), by_seed(members)))
            rows.append(
                [
                    name,
                    accuracy(members),
                    accuracy(members, "best"),
                    len(members),
                    f"{low}" if low == high else f"{low}–{high}",
                    difference,
                    f"{first.bytes_per_weight:.2f}",
                ]
            )
        header = [
            "method",
            "top-1 % (final epoch)",
            "best epoch",
            "seeds",
            "rank",
            f"{base or 'adamwprune'} − this",
            "state bytes a weight, end",
        ]
        lines += [f"### {_level_name(sparsity)}", "", *table(header, rows), ""]
    return [*lines, _RANK_NOTE, ""]


def versus_section(groups: Groups) -> list[str]:
    """What each pruning method keeps beside the optimizer, in units of weights, and the sparsity it reached."""
    pruned = {name: members for name, members in groups.items() if members[0].method != "none"}
    if not pruned:
        return []
    rows = []
    for name, members in pruned.items():
        first = members[0]
        zeros = {f"{run.metrics['final_sparsity']:.6f}" for run in members}
        rows.append(
            [
                name,
                f"{first.pruning_bytes / first.row('weights'):.3f}",
                f"{first.memory['ledger']['optimizer_bytes'] / first.row('weights'):.3f}",
                f"{100 * first.sparsity:g} %",
                ", ".join(sorted(f"{100 * float(zero):.4f} %" for zero in zeros)),
            ]
        )
    return [
        "## State against movement: what pruning keeps",
        "",
        *table(
            [
                "method",
                "masks and scores (× weights)",
                "with the optimizer's state (× weights)",
                "sparsity asked",
                "sparsity reached",
            ],
            rows,
        ),
        "",
        "In units of the weights' bytes, measured at the end of training. The number of zeros is exactly "
        "floor(sparsity × prunable weights); a run that ends elsewhere fails. The original study reports 0.03 "
        "for state and 2.03 for movement pruning, which kept a mask, scores and first weights as float32.",
        "",
    ]
