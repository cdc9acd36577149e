"""The one mask update: how many weights go, which ones, how many come back; exact over all tensors and ranks.

Of a tensor, on this rank: n weights in memory order, s survivors, c candidates (the weights that compete to stay).
    mask   uint8 [ceil(n / 8)]  in the parameter's state; 1 = survivor; not there while nothing is pruned
    drop   bool [c]             candidates that go
    grow   bool [n - s]         pruned weights that come back
A tensor may be a flat slice (ZeRO's): ranges of several parameters, and padding between them that counts for nothing
and goes at the first update. Each range competes under its parameter's name.

Scores are made CHUNK weights at a time and never held; marks are applied tensor by tensor, so the transient is one
layer. What a tensor's scores are, and what it means to lose weights, is a store's (toolkit.prune.stores).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.prune.distributed import read_numbers, sum_over
from toolkit.prune.distribution import zero_quotas
from toolkit.prune.options import PruningOptions
from toolkit.prune.patterns import n_of_m
from toolkit.prune.select import Chunks, choose_lowest, find_threshold
from toolkit.prune.stores import MaskedStore, Member, Piece, batches, check_scored
from toolkit.prune.units import GroupUnits, WeightUnits


@dataclass(frozen=True)
class _Source:
    """What a name brings to a contest: entries `first` to `last` of `count` candidates (or pruned weights) of a tensor.

    A whole tensor's candidates have its padding among them, while it has no mask.
    """

    member: Member
    name: str
    first: int
    last: int
    count: int
    values: Chunks


class _Values:
    """Values of pieces, made a batch at a time when the first of it is asked for; each is asked for in turn."""

    def __init__(
        self, pieces: Sequence[Piece], count: Callable[[Piece], int], make: Callable[[Sequence[Piece]], Tensor]
    ) -> None:
        self._make, self._count = make, count
        self._batch = {id(piece): batch for batch in batches(pieces) for piece in batch}
        self._pieces = pieces  # whose ids these are
        self._made: list[Piece] = []
        self._values: tuple[Tensor, ...] = ()

    def of(self, pieces: Sequence[Piece]) -> Iterator[Tensor]:
        """The values of each piece."""
        for piece in pieces:
            batch = self._batch[id(piece)]
            if batch is not self._made:
                self._values, self._made = (), batch
                self._values = self._make(batch).split([self._count(one) for one in batch])
            place = next(number for number, one in enumerate(batch) if one is piece)
            yield self._values[place]


def update_masks(
    members: Sequence[Member], store: MaskedStore, options: PruningOptions, step: int, group: ProcessGroup | None
) -> int | None:
    """Bring the zeros to the schedule's at `step`, let regrown weights in; returns the survivors, None if all is so.

    Call on all ranks of `group`. Raises ValueError that names a tensor without a score.
    """
    device = members[0].part.device
    kind = n_of_m(options.pattern)
    units = GroupUnits(store, kind) if kind else WeightUnits(store)
    # 1. Count units over the ranks; a model may have come with more pruned ones than are asked for.
    pieces = dict(zip(members, units.cut(members), strict=True))
    totals = sum_over(group, [units.total(member) for member in members], device)
    done = sum_over(group, [units.done(member, pieces[member]) for member in members], device)
    wanted = max(options.num_units_at(step, sum(totals)), sum(done))
    # Where those that are pruned do not compete they stay; the candidates bring the rest.
    fixed = done if units.done_stay_out else [0] * len(done)
    num_back = _num_regrown(options, step, units.survivors(sum(totals), wanted), sum(done))
    if wanted == (0 if store.pruned_compete else sum(done)) and not num_back:
        return None
    check_scored(members, step)
    # 2. Who competes with whom, for how many places: all tensors together, or each for a quota of its own.
    if options.scope == "global":
        contests = [(members, wanted - sum(fixed), num_back)]
    else:
        quotas = zero_quotas(options.scope, [units.shape(member) for member in members], fixed, wanted)
        contests = [
            ([member], quota - gone_before, _num_regrown(options, step, units.survivors(count, quota), gone))
            for member, quota, gone_before, count, gone in zip(members, quotas, fixed, totals, done, strict=True)
        ]
    # 3. Choose, and apply tensor by tensor; what comes back takes places that survivors leave.
    for competing, missing, back in contests:
        cuts = [pieces[member] for member in competing]
        back, returning = _choose_regrown(units, cuts, back, group, device) if back else (0, None)
        sources = _sources(cuts, units.count, units.scores)
        sizes = [source.last - source.first for source in sources]
        missing += units.places_left(back)
        marks = choose_lowest(*_values_and_names(sources), sizes, missing, group, device, keep_one=units.keep_one)
        for member, chosen in _joined(sources, marks, device, of_padding=True):
            grow = None if returning is None else next(returning)
            drop = units.drops(pieces[member], chosen, grow)
            store.apply(member, drop, None if grow is None else units.grows(pieces[member], grow))
    return units.survivors(sum(totals), wanted)


def _joined(
    sources: Sequence[_Source], marks: Iterator[Tensor], device: torch.device, *, of_padding: bool
) -> Iterator[tuple[Member, Tensor]]:
    """(member, marks of the whole tensor) from the marks of its ranges; padding is marked as told."""
    for member, own in itertools.groupby(sources, key=lambda source: source.member):
        ranges = list(own)
        if ranges[0].last - ranges[0].first == ranges[0].count:  # all is one range: a copy took a tenth of an update
            ranges, whole = ranges[1:], next(marks)
        else:
            whole = torch.full((ranges[0].count,), of_padding, dtype=torch.bool, device=device)
        for source, mark in zip(ranges, marks, strict=False):
            whole[source.first : source.first + mark.numel()] = mark  # none where there is no gradient to grow by
        yield member, whole


def _num_regrown(options: PruningOptions, step: int, survivors: int, pruned: int) -> int:
    """Weights that come back: the share `regrow` of the survivors, decayed by a cosine to 0 at end_step.

    RigL, arXiv 1911.11134, section 3 (3).
    """
    if not options.regrow or options.end_step is None:
        return 0
    progress = min(1.0, (step - options.begin_step) / (options.end_step - options.begin_step))
    wanted = math.floor(options.regrow * 0.5 * (1 + math.cos(math.pi * progress)) * survivors)
    return min(wanted, pruned, survivors)


def _choose_regrown(
    units: WeightUnits, cuts: Sequence[Sequence[Piece]], wanted: int, group: ProcessGroup | None, device: torch.device
) -> tuple[int, Iterator[Tensor] | None]:
    """How many units come back, and which: those with the largest gradients, marks of each member's units in turn.

    They are made as they are asked for: all at once would be more than the state may be over its budget.
    """
    sources = _sources(cuts, units.count_back, units.back_scores)
    # Of those that a gradient would move, on any rank; one without would stay a zero.
    moving = [torch.count_nonzero(part) for source in sources for part in source.values()]
    count = min(wanted, *sum_over(group, [sum(read_numbers(moving))], device))
    if not count:
        return 0, None
    threshold = find_threshold(*_values_and_names(sources), count, group, device=device)
    none = torch.zeros(0, dtype=torch.bool, device=device)
    marks = (
        torch.cat([none, *(threshold.take(values, number) for values in source.values())])
        for number, source in enumerate(sources)
    )
    return count, (grown for _, grown in _joined(sources, marks, device, of_padding=False))


def _sources(
    cuts: Sequence[Sequence[Piece]], count: Callable[[Piece], int], make: Callable[[Sequence[Piece]], Tensor]
) -> list[_Source]:
    """Of each range of each member the weights that `count` counts; `make` gives their values."""
    values = _Values([piece for pieces in cuts for piece in pieces if _in_ranges(piece)], count, make)
    found = []
    for pieces in cuts:
        member, total = pieces[0].member, sum(map(count, pieces))
        for one in member.ranges:
            own = [piece for piece in pieces if one.first <= piece.first and piece.last <= one.last]
            begin = sum(count(piece) for piece in pieces if piece.last <= one.first)
            end = begin + sum(map(count, own))
            found.append(_Source(member, one.name, begin, end, total, partial(values.of, own)))
    return found


def _in_ranges(piece: Piece) -> bool:
    """Whether it is of weights, not padding."""
    return any(one.first <= piece.first and piece.last <= one.last for one in piece.member.ranges)


def _values_and_names(sources: Sequence[_Source]) -> tuple[list[Chunks], list[str]]:
    return [source.values for source in sources], [source.name for source in sources]
