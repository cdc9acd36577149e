"""The report's opening, written from the runs: three sentences and one table. What decides is the state at its peak."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.report.runs import DENSE, CellRun, Groups, by_level, by_seed, ours, top1
from launch.report.significance import Difference, compare
from toolkit.markdown import mib, table

_LARGEST_LOSS = 1.0  # points that saved bytes may cost: a row that scatters widely is not near the best for that
_ROWS = 8  # of the table
_SAID = 3  # sparsities in a sentence
_OF_THE_BEST = ("below the highest mean", "the highest mean")  # columns

_NOTE = """\
State: bytes a weight that optimizer and pruning keep beside the weights.
Taken: of the highest mean and the rows near it the one with the least state at its peak, of equal ones the highest.
Near: at most a point below, inside the paired spread, and not beyond noise.
Behind or ahead: beyond noise. Level: neither.
Differences are paired over common seeds: mean ± spread [95 % interval of the mean].
Beyond noise: the interval leaves out 0, with at least three seeds. One in twenty equal pairs looks so by luck."""
_ONE_SEED_NOTE = """\
State: bytes a weight that optimizer and pruning keep beside the weights.
Each row ran with one seed, so no difference is more than a hint."""


@dataclass(frozen=True)
class Pick:
    """The row to take at a sparsity, and what it is held against. A difference is None without a common seed."""

    sparsity: float
    name: str
    members: Sequence[CellRun]
    best: str
    below_best: Difference | None  # the best's mean minus this one's
    dense: str  # its optimizer without pruning, empty where that did not run or is the row itself
    above_dense: Difference | None
    rivals: Sequence[Difference]  # this minus each other row of the sparsity

    @property
    def behind(self) -> int:
        """Rows of its sparsity that it is ahead of beyond noise."""
        return sum(rival.beyond_noise and rival.mean > 0 for rival in self.rivals)

    @property
    def ahead(self) -> int:
        """Rows of its sparsity that are ahead of it beyond noise."""
        return sum(rival.beyond_noise and rival.mean < 0 for rival in self.rivals)


def accuracy(members: Sequence[CellRun], which: str = "final") -> str:
    """Mean ± spread of the final or the best epoch's top-1, or the one value."""
    mean, spread = top1(members, which)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def level_name(sparsity: float) -> str:
    """A sparsity as a heading."""
    return f"{100 * sparsity:g} % sparsity" if sparsity else "Dense"


def paired(mine: Sequence[CellRun], other: Sequence[CellRun]) -> Difference | None:
    """The difference over the seeds that both have; None where there is none."""
    results, others = by_seed(mine), by_seed(other)
    return compare(results, others) if results.keys() & others.keys() else None


def _inside(best: Sequence[CellRun], other: Sequence[CellRun]) -> bool:
    """Whether a method is so near the best, over the seeds both have, that nothing tells them apart."""
    difference = paired(best, other)
    return (
        difference is not None
        and difference.seeds > 1
        and not difference.beyond_spread
        and not difference.beyond_noise
        and difference.mean <= _LARGEST_LOSS
    )


def _highest(groups: Groups) -> str:
    return max(groups, key=lambda name: top1(groups[name])[0], default="")


def _dense_of(groups: Groups, optimizer: str) -> str:
    return _highest({n: m for n, m in groups.items() if m[0].method == "none" and m[0].optimizer == optimizer})


def dense_reference(groups: Groups) -> str:
    """The dense row that others are held against: AdamW's, else the highest; empty where none is dense."""
    dense = {name: members for name, members in groups.items() if members[0].method == "none"}
    return _dense_of(groups, DENSE[0]) or _highest(dense)


def dense_beside(groups: Groups) -> str:
    """The dense row that all pruned rows to take are held against; the reference where they have not one in common."""
    found = {pick.dense for pick in picks(groups) if pick.sparsity}
    return (found.pop() if len(found) == 1 else "") or dense_reference(groups)


def picks(groups: Groups) -> list[Pick]:
    """Of each sparsity the highest mean that takes no more bytes at the peak than need be to be near the best."""
    return [_pick(sparsity, level, groups) for sparsity, level in by_level(groups).items()]


def _pick(sparsity: float, level: Groups, groups: Groups) -> Pick:
    best = _highest(level)
    peaks = {name: round(members[0].peak_bytes_per_weight, 2) for name, members in level.items()}
    budget = min(peaks[name] for name in level if name == best or _inside(level[best], level[name]))
    within = [name for name in level if peaks[name] <= budget]
    name = max(within, key=lambda one: (top1(level[one])[0], -level[one][0].bytes_per_weight))
    members = level[name]
    dense = _dense_of(groups, dict(zip(ours(), DENSE, strict=True)).get(members[0].optimizer, members[0].optimizer))
    dense = dense if sparsity else ""
    return Pick(
        sparsity,
        name,
        members,
        best,
        None if name == best else paired(level[best], members),
        dense,
        paired(members, groups[dense]) if dense else None,
        [found for other, rival in level.items() if other != name and (found := paired(members, rival))],
    )


def verdict_section(groups: Groups, picture: Sequence[str]) -> list[str]:
    """Three sentences, the picture's lines and the table: of each sparsity what to take, its cost, how sure that is.

    Of one method alone what it reached and took.
    """
    if len(groups) == 1:
        return ["## In a minute", "", *(f"- {sentence}" for sentence in _alone(*next(iter(groups.items())))), ""]
    found = picks(groups)
    several = max(len(members) for members in groups.values()) > 1
    # A row's cells by the column's name; what the highest mean is need not be said where it is taken everywhere.
    cells = [_cells(pick, groups, several) for pick in found[:_ROWS]]
    header = [name for name in cells[0] if name not in _OF_THE_BEST or any(pick.name != pick.best for pick in found)]
    text = tuple(place for place, name in enumerate(header) if name in ("at", "take", "highest", _OF_THE_BEST[1]))
    rest = len(found) - _ROWS
    return [
        "## In a minute",
        "",
        *[f"- {sentence}" for sentence in _sentences(found, groups, several)],
        "",
        *picture,
        *table(header, [[row[name] for name in header] for row in cells], text=text),
        "",
        _NOTE if several else _ONE_SEED_NOTE,
        *([f"The ranking has {rest} more sparsities."] if rest > 0 else []),
        "",
    ]


def _alone(name: str, members: Sequence[CellRun]) -> list[str]:
    """What came of the only method there is."""
    first, seeds = members[0], len(members)
    epoch = f" (epoch {first.metrics['best_epoch'] + 1})" if seeds == 1 else ""
    said = [
        f"**Result:** {name} ends at {accuracy(members)} % top-1 after {first.metrics['epochs']} epochs. "
        f"Its best epoch{epoch} has {accuracy(members, 'best')}."
    ]
    if first.method != "none":
        said.append(
            f"**Zeros:** {100 * first.metrics['final_sparsity']:.4f} % of the prunable weights; "
            f"asked for were {100 * first.sparsity:g} %."
        )
    step = _step_mib(first)
    whole = f" A step's tensors take {step} MiB on a rank, at the fullest." if step else ""
    return [
        *said,
        f"**Memory:** {first.peak_bytes_per_weight:.2f} bytes a weight of state at the peak, "
        f"{first.bytes_per_weight:.2f} at the end; AdamW keeps 8.{whole}",
        f"**How sure:** {'one seed' if seeds == 1 else f'{seeds} seeds'}, and nothing beside it. "
        "Runs of other seeds show its spread, runs of other methods what it is worth.",
    ]


def _step_mib(run: CellRun) -> str:
    """All tensors of a step at the fullest moment, empty where no step was probed."""
    most = max((phase["total_bytes"] or 0 for phase in run.memory["phases"].values()), default=0)
    return mib(most) if most else ""


def _cells(pick: Pick, groups: Groups, several: bool) -> dict[str, str]:
    first = pick.members[0]
    level = len(pick.rivals) - pick.behind - pick.ahead
    below, highest = _OF_THE_BEST
    return {
        "at": f"**{level_name(pick.sparsity)}**",
        "take" if several else "highest": f"**{pick.name}**",
        "top-1 % (seeds)": f"{accuracy(pick.members)} ({len(pick.members)})",
        "state at its peak": f"{first.peak_bytes_per_weight:.2f}",
        "state at the end": f"{first.bytes_per_weight:.2f}",
        below: "–" if pick.name == pick.best else str(pick.below_best),
        highest: f"{pick.best}: {accuracy(groups[pick.best])}",
        "against its optimizer, dense": f"{pick.dense}: {pick.above_dense}" if pick.above_dense else "–",
        "others behind / level / ahead": f"{pick.behind} / {level} / {pick.ahead}",
    }


def _sentences(found: Sequence[Pick], groups: Groups, several: bool) -> list[str]:
    """What to take, what it costs at the peak, how sure that is."""
    said = [pick for pick in found if pick.sparsity][:_SAID] or found
    runs = [pick.members[0] for pick in said]
    # Beside a pruned row only: a dense one may be the reference itself.
    dense = [*(pick.dense for pick in said), dense_reference(groups)] if said[0].sparsity else []
    beside = [name for name in dict.fromkeys(dense) if name]
    scores = ", ".join(f"{one} {top1(groups[one])[0]:.2f}" for one in beside)
    keeps = ", ".join(f"{one} {groups[one][0].peak_bytes_per_weight:.2f}" for one in beside)
    names = _joined((f"{pick.name} ({top1(pick.members)[0]:.2f})" for pick in said), "or")
    peaks = _each(f"{run.peak_bytes_per_weight:.2f}" for run in runs)
    ends = _each(f"{run.bytes_per_weight:.2f}" for run in runs)
    steps, steps_beside = [_step_mib(run) for run in runs], [_step_mib(groups[one][0]) for one in beside]
    known = beside and all(steps + steps_beside)
    whole = f" All tensors of a step: {_each(steps)} MiB; dense {_joined(steps_beside, 'and')}." if known else ""
    return [
        f"**{'Take' if several else 'Highest'}:** {names} % top-1." + (f" Dense: {scores}." if beside else ""),
        f"**Cost:** {peaks} bytes a weight of state at the peak, {ends} at the end."
        + (f" Dense: {keeps}." if beside else "")
        + whole,
        f"**How sure:** {_sureness(said, several)}",
    ]


def _sureness(said: Sequence[Pick], several: bool) -> str:
    if not several:
        return "one seed a row, so any lead may be luck."
    counts = sorted({len(pick.members) for pick in said})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    if not any(pick.rivals for pick in said):
        return f"{seeds} seeds, but there is no other row to compare with."
    behind = _at(said, (f"{pick.behind} of {len(pick.rivals)}" for pick in said))
    ahead = sum(pick.ahead for pick in said)
    found = [pick.above_dense for pick in said]
    losses = _at(said, (one.briefly() for one in found if one)) if all(found) else ""
    dense = list(dict.fromkeys(pick.dense for pick in said))
    against = f" Against {f'dense {dense[0]}' if len(dense) == 1 else 'the same optimizers, dense'}: {losses} points."
    return (
        f"{seeds} seeds.{against if losses else ''} "
        f"Other rows behind it beyond noise: {behind}; ahead: {ahead or 'none'}."
    )


def _at(said: Sequence[Pick], values: Iterable[str]) -> str:
    """Each value with its sparsity, where there are several."""
    if len(said) == 1:
        return next(iter(values))
    return _joined((f"at {100 * pick.sparsity:g} % {value}" for pick, value in zip(said, values, strict=True)), "and")


def _each(values: Iterable[str]) -> str:
    """The values in their order, or the one that all have."""
    listed = list(values)
    return listed[0] if len(set(listed)) == 1 else _joined(listed, "and")


def _joined(values: Iterable[str], word: str) -> str:
    *most, last = values
    return f"{', '.join(most)} {word} {last}" if most else last
