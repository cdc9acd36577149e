"""The one mask update: how many weights go, which ones, how many come back; exact over all tensors and ranks.

Of a tensor, on this rank: n weights in memory order, s survivors, c candidates (the weights that compete to stay).
    mask   uint8 [ceil(n / 8)]  in the parameter's state; 1 = survivor; not there while nothing is pruned
    drop   bool [c]             candidates that go
    grow   bool [n - s]         pruned weights that come back
A tensor may be a flat slice (ZeRO's): ranges of several parameters, and padding between them that counts for nothing
and goes at the first update. Each range competes under its parameter's name.

Scores are made CHUNK weights at a time and never held; marks are applied tensor by tensor, so the transient is one
layer. What a tensor's scores are, and what it means to lose weights, is a Store's (toolkit.prune.stores).
"""

import itertools
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.prune.distributed import FlatSlices, sum_over, to_local
from toolkit.prune.distribution import zero_quotas
from toolkit.prune.mask import flat_view
from toolkit.prune.options import PruningOptions
from toolkit.prune.packing import pack_range, survivors_before
from toolkit.prune.select import CHUNK, Chunks, choose_lowest, find_threshold


class Member:
    """A prunable tensor in a mask update: the optimizer's parameter, this rank's part of it, its state."""

    def __init__(
        self, name: str, parameter: Tensor, state: MutableMapping[str, Tensor], ranges: FlatSlices | None = None
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.part = to_local(parameter)
        self.state = state
        self.ranges = ranges if ranges is not None else [(name, 0, self.part.numel())]

    @property
    def mask(self) -> Tensor | None:
        """The bits, None while nothing is pruned."""
        return self.state.get("mask")

    @property
    def num_weights(self) -> int:
        """Weights on this rank, without padding."""
        return sum(last - first for _, first, last in self.ranges)

    @property
    def num_survivors(self) -> int:
        """Weights on this rank that are not pruned."""
        return self.num_weights if self.mask is None else survivors_before(self.mask, self.part.numel())


class Store(Protocol):
    """What an optimizer keeps for its prunable weights."""

    pruned_compete: bool  # whether pruned weights are candidates too: their scores rest, and may win them back

    def scores(self, member: Member, first: int, last: int) -> Iterator[Tensor]:
        """Scores of the candidates among the weights `first` to `last`, in memory order, CHUNK weights at a time.

        A survivor that is exactly 0 scores -inf: it is a zero already, and must be among those asked for.
        """

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Change the mask, and what is kept for the weights it takes away or brings back."""


@dataclass(frozen=True)
class _Source:
    """What a name brings to a contest: entries `first` to `last` of all candidates (or pruned weights) of a tensor."""

    index: int  # of the member
    name: str
    first: int
    last: int
    values: Chunks

    @property
    def size(self) -> int:
        return self.last - self.first


def chunk_borders(first: int, last: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks of a range, cut at multiples of CHUNK, where a byte of the mask begins."""
    while first < last:
        stop = min((first // CHUNK + 1) * CHUNK, last)
        yield first, stop
        first = stop


def gradient_of(member: Member) -> Tensor:
    """The gradient in its parameter's memory layout."""
    grad = member.parameter.grad
    assert grad is not None
    grad = to_local(grad)
    return grad if grad.stride() == member.part.stride() else torch.empty_like(member.part).copy_(grad)


def update_masks(
    members: Sequence[Member], store: Store, options: PruningOptions, step: int, group: ProcessGroup | None = None
) -> bool:
    """Bring the zeros to the schedule's at `step` and let regrown weights in; returns whether any mask was changed.

    Call on all ranks of `group`. Raises ValueError that names a tensor without a score.
    """
    return _MaskUpdate(members, store, options, group).run(step)


@dataclass(frozen=True)
class _MaskUpdate:
    members: Sequence[Member]
    store: Store
    options: PruningOptions
    group: ProcessGroup | None

    def run(self, step: int) -> bool:
        # 1. Count weights and zeros over the ranks; a model may have come with more zeros than are asked for.
        weights = self._over_ranks([member.num_weights for member in self.members])
        survivors = self._over_ranks([member.num_survivors for member in self.members])
        pruned = [count - left for count, left in zip(weights, survivors, strict=True)]
        zeros = max(self.options.schedule.num_zeros_at(step, sum(weights)), sum(pruned))
        # Zeros that do not compete stay; the candidates bring the rest.
        fixed = [0] * len(pruned) if self.store.pruned_compete else pruned
        num_back = self._num_regrown(step, sum(weights) - zeros, sum(pruned))
        if zeros == sum(fixed) and not num_back:
            return False
        self._check_scored(step)
        # 2. Who competes with whom, for how many places: all tensors together, or each for a quota of its own.
        if self.options.scope == "global":
            contests = [(list(range(len(weights))), zeros - sum(fixed), num_back)]
        else:
            shapes = [member.parameter.shape for member in self.members]
            quotas = zero_quotas(self.options.scope, shapes, fixed, zeros)
            contests = [
                ([i], quota - fixed[i], self._num_regrown(step, weights[i] - quota, pruned[i]))
                for i, quota in enumerate(quotas)
            ]
        # 3. Choose, and apply tensor by tensor; what comes back takes places that survivors leave.
        for indices, missing, back in contests:
            back = min(back, sum(self._num_movable(i) for i in indices)) if back else 0
            grows = self._choose_regrown(indices, back) if back else {}
            sources = [source for i in indices for source in self._candidates(i)]
            marks = choose_lowest(
                [source.values for source in sources],
                [source.name for source in sources],
                [source.size for source in sources],
                missing + back,
                self.group,
            )
            for i, drop in self._joined(sources, marks, self._num_candidates, of_padding=True):
                self.store.apply(self.members[i], drop, grows.get(i))
        return True

    def _over_ranks(self, counts: list[int]) -> list[int]:
        return sum_over(self.group, counts, self.members[0].part.device)

    def _check_scored(self, step: int) -> None:
        for member in self.members:
            if member.parameter.grad is None and not member.state:
                raise ValueError(
                    f"{member.name} is prunable but had no gradient by step {step}, so it has no score; freeze it "
                    "(requires_grad=False, out of the optimizer) or mark its group prunable=False"
                )

    def _num_candidates(self, i: int) -> int:
        """Of a whole tensor: also its padding, while it has no mask."""
        member = self.members[i]
        n = member.part.numel()
        return n if self.store.pruned_compete else survivors_before(member.mask, n)

    def _num_pruned(self, i: int) -> int:
        member = self.members[i]
        return member.part.numel() - survivors_before(member.mask, member.part.numel())

    def _candidates(self, i: int) -> Iterator[_Source]:
        member = self.members[i]
        mask = None if self.store.pruned_compete else member.mask
        for name, first, last in member.ranges:
            scores = partial(self.store.scores, member, first, last)
            yield _Source(i, name, survivors_before(mask, first), survivors_before(mask, last), scores)

    def _pruned(self, i: int) -> Iterator[_Source]:
        member = self.members[i]
        for name, first, last in member.ranges:
            begin, end = (position - survivors_before(member.mask, position) for position in (first, last))
            yield _Source(i, name, begin, end, partial(_pruned_gradients, member, first, last))

    @staticmethod
    def _joined(
        sources: Sequence[_Source], marks: Iterator[Tensor], size_of: Callable[[int], int], *, of_padding: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """(member, marks of the whole tensor) from the marks of its ranges; padding is marked as told."""
        for i, parts in itertools.groupby(zip(sources, marks, strict=True), lambda pair: pair[0].index):
            whole: Tensor | None = None
            size = size_of(i)
            for source, mark in parts:
                if source.size == size:
                    whole = mark
                    continue
                if whole is None:
                    whole = torch.full((size,), of_padding, dtype=torch.bool, device=mark.device)
                whole[source.first : source.last] = mark
            assert whole is not None
            yield i, whole

    def _num_regrown(self, step: int, survivors: int, pruned: int) -> int:
        """Weights that come back: the share `regrow` of the survivors, decayed by a cosine to 0 at end_step.

        RigL, arXiv 1911.11134, section 3 (3).
        """
        schedule, share = self.options.schedule, self.options.regrow
        if not share or schedule.end_step is None:
            return 0
        progress = min(1.0, (step - schedule.begin_step) / (schedule.end_step - schedule.begin_step))
        wanted = math.floor(share * 0.5 * (1 + math.cos(math.pi * progress)) * survivors)
        return min(wanted, pruned, survivors)

    def _num_movable(self, i: int) -> int:
        """Pruned weights, over all ranks, that a gradient would move; one without would stay a zero."""
        moved = (int((part != 0).sum()) for source in self._pruned(i) for part in source.values())
        return self._over_ranks([sum(moved)])[0]

    def _choose_regrown(self, indices: Sequence[int], count: int) -> dict[int, Tensor]:
        """The `count` pruned weights with the largest gradients: member -> bool [pruned]."""
        sources = [source for i in indices for source in self._pruned(i)]
        threshold = find_threshold(
            [source.values for source in sources], [source.name for source in sources], count, self.group
        )
        none = self.members[0].part.new_zeros(0, dtype=torch.bool)
        marks = (
            torch.cat([none, *(threshold.take(values, number) for values in source.values())])
            for number, source in enumerate(sources)
        )
        return dict(self._joined(sources, marks, self._num_pruned, of_padding=False))


def _pruned_gradients(member: Member, first: int, last: int) -> Iterator[Tensor]:
    """-|gradient| of the pruned weights among `first` to `last`, in memory order, CHUNK weights at a time."""
    if member.mask is None or member.parameter.grad is None:
        return
    grad, gone = flat_view(gradient_of(member)), ~member.mask
    for start, stop in chunk_borders(first, last):
        yield -pack_range(grad, gone, start, stop).float().abs()
