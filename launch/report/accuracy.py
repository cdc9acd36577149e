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


def _paired(mine: Sequence[CellRun], other: Sequence[CellRun]) -> Difference | None:
    """The difference over the seeds that both have; None where there is none."""
    results, others = by_seed(mine), by_seed(other)
    return compare(results, others) if results.keys() & others.keys() else None


def _inside(best: Sequence[CellRun], other: Sequence[CellRun]) -> bool:
    """Whether a method is so near the best, over the seeds both have, that nothing tells them apart."""
    difference = _paired(best, other)
    return (
        difference is not None
        and difference.seeds > 1
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
    mine = [row for level in levels.values() for own in ours() for row in _ours(level, own)]
    return [
        "## In a minute",
        "",
        *table(
            [
                "at",
                "use",
                "top-1 %",
                "bytes a weight",
                "below the highest mean",
                "the highest mean",
                "its top-1 %",
                "its bytes a weight",
            ],
            [_advice(sparsity, level) for sparsity, level in levels.items()],
        ),
        "",
        _ADVICE_NOTE,
        "",
        *(
            [
                *table(
                    [
                        "ours",
                        "top-1 %",
                        "bytes a weight",
                        "best other row of its family",
                        "its top-1 %",
                        "its bytes a weight",
                        "difference",
                        "which is",
                        "other rows: behind / inside / ahead",
                    ],
                    mine,
                ),
                "",
                _OURS_NOTE,
                "",
            ]
            if mine
            else []
        ),
    ]


def _advice(sparsity: float, level: Groups) -> list[str]:
    """A row of the first table: the cheapest method among those that the best is not told apart from."""
    best = max(level, key=lambda name: top1(level[name])[0])
    close = [name for name in level if name == best or _inside(level[best], level[name])]
    use = min(close, key=lambda name: (round(level[name][0].bytes_per_weight, 3), -top1(level[name])[0]))
    below = "–" if use == best else str(_paired(level[best], level[use]))
    return [f"**{_level_name(sparsity)}**", f"**{use}**", *_figures(level[use]), below, best, *_figures(level[best])]


def _figures(members: Sequence[CellRun]) -> list[str]:
    return [accuracy(members), f"{members[0].bytes_per_weight:.2f}"]


def _ours(level: Groups, own: str) -> list[list[str]]:
    """A row of the second table for the best row of one of ours, or none."""
    mine = [name for name in level if level[name][0].optimizer == own and level[name][0].method == "state"]
    if not mine:
        return []
    name = max(mine, key=lambda one: top1(level[one])[0])
    others = {other: _paired(level[name], members) for other, members in level.items() if not members[0].is_ours}
    found = {other: difference for other, difference in others.items() if difference}
    of_family = [other for other in found if level[other][0].family == level[name][0].family]
    if not of_family:
        return []
    rival = max(of_family, key=lambda one: top1(level[one])[0])
    beside = [str(found[rival]), _judged(found[rival])]
    behind = sum(one.beyond_spread and one.mean > 0 for one in found.values())
    ahead = sum(one.beyond_spread and one.mean < 0 for one in found.values())
    tally = f"{behind} / {len(found) - behind - ahead} / {ahead}"
    return [[name, *_figures(level[name]), rival, *_figures(level[rival]), *beside, tally]]


def ranking_section(groups: Groups) -> list[str]:
    """One table a sparsity, best mean first, each row paired against adamwprune's."""
    lines = ["## Ranking", ""]
    for sparsity, level in by_level(groups).items():
        ranks = rank_ranges({name: by_seed(members) for name, members in level.items()})
        own = [name for name in level if level[name][0].optimizer == "adamwprune"]
        base = max(own, key=lambda name: top1(level[name])[0], default="")
        rows = [
            [
                name,
                accuracy(members),
                accuracy(members, "best"),
                len(members),
                "–".join(map(str, dict.fromkeys(ranks[name]))),  # the lowest and the highest, or the one there is
                "–" if base in ("", name) else str(_paired(level[base], members) or "–"),
                f"{members[0].bytes_per_weight:.2f}",
            ]
            for name, members in sorted(level.items(), key=lambda item: -top1(item[1])[0])
        ]
        lines += [
            f"### {_level_name(sparsity)}",
            "",
            *table(
                [
                    "method",
                    "top-1 % (final epoch)",
                    "best epoch",
                    "seeds",
                    "rank",
                    f"{base or 'adamwprune'} − this",
                    "state bytes a weight, end",
                ],
                rows,
            ),
            "",
        ]
    return [*lines, _RANK_NOTE, ""]


def versus_section(groups: Groups) -> list[str]:
    """What each pruning method keeps beside the optimizer, in units of weights, and the sparsity it reached."""
    pruned = {name: members for name, members in groups.items() if members[0].method != "none"}
    if not pruned:
        return []
    rows = [
        [
            name,
            f"{first.pruning_bytes / first.row('weights'):.3f}",
            f"{first.memory['ledger']['optimizer_bytes'] / first.row('weights'):.3f}",
            f"{100 * first.sparsity:g} %",
            ", ".join(sorted({f"{100 * round(run.metrics['final_sparsity'], 6):.4f} %" for run in (first, *rest)})),
        ]
        for name, (first, *rest) in pruned.items()
    ]
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
        "floor(sparsity × prunable weights), of whole channels as many as go into that, of N:M those of all groups of "
        "the layers it fits; a run that ends elsewhere fails. The original study reports 0.03 "
        "for state and 2.03 for movement pruning, which kept a mask, scores and first weights as float32.",
        "",
    ]
