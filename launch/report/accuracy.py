"""The report's sections on accuracy: ours beside the rest, the ranking at each sparsity, what pruning keeps."""

from collections.abc import Sequence

from launch.report.runs import CellRun, Groups, by_level, by_seed, ours, top1
from launch.report.significance import Difference, rank_ranges
from launch.report.verdict import accuracy, level_name, paired
from toolkit.markdown import table

_RANK_NOTE = """\
Final epoch; mean ± standard deviation over the seeds.
The difference is paired by seed: mean ± spread [95 % interval of the mean].
A rank is the range left open when all pairs of the table are compared together (Holm, 5 %)."""

_OURS_NOTE = """\
The best of ours where there are several; bytes are those at the end. Other rows: of all optimizers but our two.
Behind or ahead: beyond noise. Level: neither.
The best of many rows is in part the luckiest, and one of twenty true draws looks beyond noise.
The ranks below allow for that. With many rows and three seeds they can tell hardly any apart."""


def _judged(difference: Difference) -> str:
    if difference.beyond_noise:
        return "beyond noise"
    return "beyond the paired spread, not beyond noise" if difference.beyond_spread else "inside the spread: no winner"


def ours_section(groups: Groups) -> list[str]:
    """How ours fare beside the best other row of their family, at each sparsity; nothing where there is one seed."""
    mine = [row for level in by_level(groups).values() for own in ours() for row in _ours(level, own)]
    if not mine or max(len(members) for members in groups.values()) < 2:
        return []
    header = [
        "ours",
        "top-1 %",
        "bytes a weight",
        "best other row of its family",
        "its top-1 %",
        "its bytes a weight",
        "difference",
        "which is",
        "other rows: behind / level / ahead",
    ]
    return ["## Ours beside the rest", "", *table(header, mine), "", _OURS_NOTE, ""]


def _figures(members: Sequence[CellRun]) -> list[str]:
    return [accuracy(members), f"{members[0].bytes_per_weight:.2f}"]


def _ours(level: Groups, own: str) -> list[list[str]]:
    """A row for the best row of one of ours, or none."""
    mine = [name for name in level if level[name][0].optimizer == own and level[name][0].method == "state"]
    if not mine:
        return []
    name = max(mine, key=lambda one: top1(level[one])[0])
    others = {other: paired(level[name], members) for other, members in level.items() if not members[0].is_ours}
    found = {other: difference for other, difference in others.items() if difference}
    of_family = [other for other in found if level[other][0].family == level[name][0].family]
    if not of_family:
        return []
    rival = max(of_family, key=lambda one: top1(level[one])[0])
    beside = [str(found[rival]), _judged(found[rival])]
    behind = sum(one.beyond_noise and one.mean > 0 for one in found.values())
    ahead = sum(one.beyond_noise and one.mean < 0 for one in found.values())
    tally = f"{behind} / {len(found) - behind - ahead} / {ahead}"
    return [[name, *_figures(level[name]), rival, *_figures(level[rival]), *beside, tally]]


def find_baseline(groups: Groups, name: str | None) -> str | None:
    """The method of a name, which may be one of its runs'. Raises ValueError where there is none."""
    found = [method for method, members in groups.items() if name in (method, *(run.folder.name for run in members))]
    if name is not None and not found:
        raise ValueError(f"--baseline {name} is no method or run of these; there are {', '.join(groups)}")
    return found[0] if found else None


def ranking_section(groups: Groups, baseline: str | None = None) -> list[str]:
    """One table a sparsity, best mean first, each row paired against the `baseline` or its level's best adamwprune."""
    lines = ["## Ranking", ""]
    for sparsity, level in by_level(groups).items():
        ranks = rank_ranges({name: by_seed(members) for name, members in level.items()})
        own = [name for name in level if level[name][0].optimizer == "adamwprune"]
        base = baseline or max(own, key=lambda name: top1(level[name])[0], default="")
        rows = [
            [
                name,
                accuracy(members),
                accuracy(members, "best"),
                len(members),
                "–".join(map(str, dict.fromkeys(ranks[name]))),  # the lowest and the highest, or the one there is
                "–" if base in ("", name) else str(paired(groups[base], members) or "–"),
                f"{members[0].peak_bytes_per_weight:.2f}",
                f"{members[0].bytes_per_weight:.2f}",
            ]
            for name, members in sorted(level.items(), key=lambda item: -top1(item[1])[0])
        ]
        lines += [
            f"### {level_name(sparsity)}",
            "",
            *table(
                [
                    "method",
                    "top-1 % (final epoch)",
                    "best epoch",
                    "seeds",
                    "rank",
                    f"{base or 'adamwprune'} − this",
                    "state bytes a weight, peak",
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
        "floor(sparsity × prunable weights). Of whole channels it is as many as go into that, of N:M those of all "
        "groups of the layers it fits. A run that ends elsewhere fails. The original study reports 0.03 for state "
        "and 2.03 for movement pruning. Its movement kept a mask, scores and first weights as float32.",
        "",
    ]
