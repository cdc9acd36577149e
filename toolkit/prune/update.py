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

from toolkit.prune.distributed import local_gradient, read_numbers, sum_over
from toolkit.prune.distribution import zero_quotas
from toolkit.prune.options import PruningOptions
from toolkit.prune.select import Chunks, choose_lowest, find_threshold
from toolkit.prune.stores import MaskedStore, Member, Piece, batches, cut, pack_pieces


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
    # 1. Count weights and zeros over the ranks; a model may have come with more zeros than are asked for.
    weights = sum_over(group, [member.num_weights for member in members], device)
    pieces = dict(zip(members, cut(members), strict=True))
    survivors = sum_over(group, [num_survivors(member, pieces[member]) for member in members], device)
    pruned = [count - left for count, left in zip(weights, survivors, strict=True)]
    zeros = max(options.num_zeros_at(step, sum(weights)), sum(pruned))
    # Zeros that do not compete stay; the candidates bring the rest.
    fixed = [0] * len(pruned) if store.pruned_compete else pruned
    num_back = _num_regrown(options, step, sum(weights) - zeros, sum(pruned))
    if zeros == sum(fixed) and not num_back:
        return None
    _check_scored(members, step)
    # 2. Who competes with whom, for how many places: all tensors together, or each for a quota of its own.
    if options.scope == "global":
        contests = [(members, zeros - sum(fixed), num_back)]
    else:
        shapes = [member.parameter.shape for member in members]
        quotas = zero_quotas(options.scope, shapes, fixed, zeros)
        contests = [
            ([member], quota - gone_before, _num_regrown(options, step, count - quota, gone))
            for member, quota, gone_before, count, gone in zip(members, quotas, fixed, weights, pruned, strict=True)
        ]
    # 3. Choose, and apply tensor by tensor; what comes back takes places that survivors leave.
    for competing, missing, back in contests:
        cuts = [pieces[member] for member in competing]
        back, grows = _choose_regrown(cuts, back, group, device) if back else (0, {})
        sources = _sources(cuts, store.count, store.scores)
        sizes = [source.last - source.first for source in sources]
        marks = choose_lowest(*_values_and_names(sources), sizes, missing + back, group, device)
        for member, drop in _joined(sources, marks, device, of_padding=True):
            store.apply(member, drop, grows.get(member))
    return sum(weights) - zeros


def _check_scored(members: Sequence[Member], step: int) -> None:
    for member in members:
        if member.parameter.grad is None and not member.state:
            raise ValueError(
                f"{member.name} is prunable but had no gradient by step {step}, so it has no score; freeze it "
                "(requires_grad=False, out of the optimizer) or mark its group prunable=False"
            )


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


def num_survivors(member: Member, pieces: Sequence[Piece]) -> int:
    """Weights on this rank that are not pruned; padding counts for nothing, and has no bit once there is a mask."""
    return member.num_weights if member.mask is None else sum(piece.kept for piece in pieces)


def _choose_regrown(
    cuts: Sequence[Sequence[Piece]], wanted: int, group: ProcessGroup | None, device: torch.device
) -> tuple[int, dict[Member, Tensor]]:
    """How many come back, and which: the pruned weights with the largest gradients, member -> bool [pruned]."""
    sources = _sources(cuts, _num_pruned, _pruned_gradients)
    # Of those that a gradient would move, on any rank; one without would stay a zero.
    moving = [torch.count_nonzero(part) for source in sources for part in source.values()]
    count = min(wanted, *sum_over(group, [sum(read_numbers(moving))], device))
    if not count:
        return 0, {}
    threshold = find_threshold(*_values_and_names(sources), count, group, device=device)
    none = torch.zeros(0, dtype=torch.bool, device=device)
    marks = (
        torch.cat([none, *(threshold.take(values, number) for values in source.values())])
        for number, source in enumerate(sources)
    )
    return count, dict(_joined(sources, marks, device, of_padding=False))


def _sources(
    cuts: Sequence[Sequence[Piece]], count: Callable[[Piece], int], make: Callable[[Sequence[Piece]], Tensor]
) -> list[_Source]:
    """Of each range of each member the weights that `count` counts; `make` gives their values."""
    values = _Values([piece for pieces in cuts for piece in pieces if _in_ranges(piece)], count, make)
    found = []
    for pieces in cuts:
        member, total = pieces[0].member, sum(map(count, pieces))
        for name, first, last in member.ranges:
            own = [piece for piece in pieces if first <= piece.first and piece.last <= last]
            begin = sum(count(piece) for piece in pieces if piece.last <= first)
            end = begin + sum(map(count, own))
            found.append(_Source(member, name, begin, end, total, partial(values.of, own)))
    return found


def _in_ranges(piece: Piece) -> bool:
    """Whether it is of weights, not padding."""
    return any(first <= piece.first and piece.last <= last for _, first, last in piece.member.ranges)


def _values_and_names(sources: Sequence[_Source]) -> tuple[list[Chunks], list[str]]:
    return [source.values for source in sources], [source.name for source in sources]


def _num_pruned(piece: Piece) -> int:
    """Weights of a piece that are pruned."""
    return piece.last - piece.first - piece.kept


def _pruned_gradients(pieces: Sequence[Piece]) -> Tensor:
    """-|gradient| of the pruned weights of the pieces, in memory order; 0 where there is no gradient."""
    masks = [~piece.mask for piece in pieces if piece.mask is not None]
    if not masks:  # nothing is pruned
        return pieces[0].member.part.new_zeros(0, dtype=torch.float32)
    grads = [
        piece.of(local_gradient(piece.member.parameter, piece.member.part))
        if piece.member.parameter.grad is not None
        else piece.of(piece.member.part).new_zeros(piece.last - piece.first)
        for piece in pieces
    ]
    return -pack_pieces([grads], masks, sum(map(_num_pruned, pieces)))[0].float().abs()
