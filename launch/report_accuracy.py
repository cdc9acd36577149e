"""The report's sections on accuracy: the answer in a minute, the ranking at each sparsity, exactness, cost."""

from collections.abc import Mapping, Sequence

from launch.report_memory import table
from launch.runs import CellRun
from launch.statistics import Difference, compare, mean_and_spread, rank_ranges

__all__ = ["OURS", "accuracy", "by_seed", "ranking_section", "verdict_section", "versus_section"]

OURS = ("adamwprune", "sgdprune")
Groups = Mapping[str, Sequence[CellRun]]

_RANK_NOTE = """\
Final epoch; mean ± standard deviation over the seeds. The difference is paired by seed: mean ± spread [95 % interval of
the mean]. A rank is the range that is left open when all pairs of the table are compared together (Holm, 5 %)."""


def by_seed(members: Sequence[CellRun]) -> dict[int, float]:
    """seed -> final top-1 in percent."""
    return {run.metrics["seed"]: run.metrics["final_top1"] for run in members}


def accuracy(values: Sequence[float]) -> str:
    """Mean ± spread, or the one value."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _levels(groups: Groups) -> dict[float, dict[str, Sequence[CellRun]]]:
    """Sparsity -> groups, dense first."""
    levels: dict[float, dict[str, Sequence[CellRun]]] = {}
    for name, members in groups.items():
        levels.setdefault(members[0].sparsity, {})[name] = members
    return dict(sorted(levels.items()))


def _level_name(sparsity: float) -> str:
    return f"{100 * sparsity:g} % sparsity" if sparsity else "Dense"


def _mean(members: Sequence[CellRun]) -> float:
    return mean_and_spread(list(by_seed(members).values()))[0]


def _said(name: str, members: Sequence[CellRun]) -> str:
    return f"{name} {accuracy(list(by_seed(members).values()))} % at {members[0].bytes_per_weight:.2f} bytes a weight"


def _inside(best: Sequence[CellRun], other: Sequence[CellRun]) -> bool:
    """Whether two methods lie within the spread of their differences over the seeds they share."""
    shared = by_seed(best).keys() & by_seed(other).keys()
    return len(shared) > 1 and not compare(by_seed(best), by_seed(other)).beyond_spread


def _judged(difference: Difference) -> str:
    if difference.beyond_noise:
        return "beyond noise"
    return "beyond the paired spread, not beyond noise" if difference.beyond_spread else "inside the spread: no winner"


def _tally(level: Mapping[str, Sequence[CellRun]], name: str) -> str:
    """How one method fares against every other row of its table."""
    differences = [
        compare(by_seed(level[name]), by_seed(other))
        for other in level.values()
        if other is not level[name] and len(by_seed(level[name]).keys() & by_seed(other).keys()) > 1
    ]
    ahead = [difference for difference in differences if difference.beyond_spread and difference.mean > 0]
    behind = [difference for difference in differences if difference.beyond_spread and difference.mean < 0]
    sure = [sum(difference.beyond_noise for difference in some) for some in (ahead, behind)]
    return (
        f"Of {len(differences)} other rows {len(ahead)} are behind by more than the paired spread ({sure[0]} beyond "
        f"noise), {len(behind)} ahead ({sure[1]} beyond noise), the rest inside it."
    )


def _family(run: CellRun) -> str:
    return "SGD" if run.optimizer in ("sgd", "momentum", "sgdprune") else "Adam"


def verdict_section(groups: Groups) -> list[str]:
    """At each sparsity: the highest mean, and ours against the best other row of its family, with what each costs."""
    if max(len(members) for members in groups.values()) < 2:
        return []
    lines = ["## In a minute", ""]
    for sparsity, level in _levels(groups).items():
        best = max(level, key=lambda name: _mean(level[name]))
        lines.append(f"- **{_level_name(sparsity)}.** Highest mean: {_said(best, level[best])}.")
        close = [name for name in level if name == best or _inside(level[best], level[name])]
        cheap = min(close, key=lambda name: level[name][0].bytes_per_weight)
        if cheap != best:
            difference = compare(by_seed(level[cheap]), by_seed(level[best]))
            lines.append(
                f"    - **Use {_said(cheap, level[cheap])}**: the fewest bytes of all whose distance to the highest "
                f"mean lies inside the paired spread ({difference})."
            )
        else:
            lines.append("    - **Use it**: all others are beyond the paired spread below it, or take more bytes.")
        for own in OURS:
            mine = [name for name in level if level[name][0].optimizer == own and level[name][0].method == "state"]
            if not mine:
                continue
            name = max(mine, key=lambda one: _mean(level[one]))
            family = _family(level[name][0])
            others = [n for n in level if _family(level[n][0]) == family and level[n][0].optimizer not in OURS]
            if not others:
                continue
            rival = max(others, key=lambda one: _mean(level[one]))
            if not by_seed(level[name]).keys() & by_seed(level[rival]).keys():
                continue
            difference = compare(by_seed(level[name]), by_seed(level[rival]))
            lines.append(
                f"    - {_said(name, level[name])}; best other row of {family}'s family: {_said(rival, level[rival])}. "
                f"Difference {difference}, {_judged(difference)}. {_tally(level, name)}"
            )
    note = "Bytes a weight: what optimizer and pruning keep at the end of training, beside the weights themselves."
    return [*lines, "", note, ""]


def ranking_section(groups: Groups) -> list[str]:
    """One table a sparsity, best mean first, each row paired against adamwprune's."""
    lines = ["## Ranking", ""]
    for sparsity, level in _levels(groups).items():
        ranks = rank_ranges({name: by_seed(members) for name, members in level.items()}) if len(level) > 1 else {}
        own = [name for name in level if level[name][0].optimizer == "adamwprune"]
        base = max(own, key=lambda name: _mean(level[name]), default=None)
        rows = []
        for name, members in sorted(level.items(), key=lambda item: -_mean(item[1])):
            first = members[0]
            low, high = ranks.get(name, (1, 1))
            best = [run.metrics["best_top1"] for run in members]
            difference = "–"
            if base is not None and name != base and by_seed(level[base]).keys() & by_seed(members).keys():
                difference = str(compare(by_seed(level[base]), by_seed(members)))
            rows.append(
                [name, accuracy(list(by_seed(members).values())), accuracy(best), str(len(members)),
                 f"{low}" if low == high else f"{low}–{high}", difference, f"{first.bytes_per_weight:.2f}"]
            )  # fmt: skip
        header = ["method", "top-1 % (final epoch)", "best epoch", "seeds", "rank", f"{base or 'adamwprune'} − this",
                  "state bytes a weight, end"]  # fmt: skip
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
            [name, f"{first.pruning_bytes / first.row('weights'):.3f}",
             f"{first.memory['ledger']['optimizer_bytes'] / first.row('weights'):.3f}",
             f"{100 * first.sparsity:g} %", ", ".join(sorted(f"{100 * float(zero):.4f} %" for zero in zeros))]
        )  # fmt: skip
    return [
        "## State against movement: what pruning keeps", "",
        *table(["method", "masks and scores (× weights)", "with the optimizer's state (× weights)", "sparsity asked",
                "sparsity reached"], rows), "",
        "In units of the weights' bytes, measured at the end of training. The number of zeros is exactly "
        "floor(sparsity × prunable weights); a run that ends elsewhere fails. The original study reports 0.03 "
        "for state and 2.03 for movement pruning, which kept a mask, scores and first weights as float32.", "",
    ]  # fmt: skip
