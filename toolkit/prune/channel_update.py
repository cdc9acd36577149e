"""The mask update for whole channels: every channel goes with all that depends on it, the cheapest first.

Of all members (prunable tensors) and channel groups together:
    sums     float64 [size]  of a member and axis: scores of the survivors at each place of the axis
    counts   float64 [size]  likewise: how many survivors there are
    alive    bool [count]    of a group: channels that are not removed
A channel's score is the mean over its weights, of all layers that have a part in it. (Each layer's scores over the mean
of what it has left were tried: SGD's layers then lost all channels but one, results/LOG.md.)
Ranks of a sharded model add up sums and counts, and choose alike from them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.prune.channels import ChannelGroup
from toolkit.prune.distributed import first_weight
from toolkit.prune.mask import flat_view, unpack_bits
from toolkit.prune.options import PruningOptions
from toolkit.prune.patterns import LOWEST
from toolkit.prune.stores import MaskedStore, Member, check_scored, cut

_AXES = (0, 1)
_Vectors = dict[tuple[str, int], Tensor]  # (member, axis) -> float64 [size of the axis], on the host


@dataclass
class _Size:
    """How much of a member is left: survivors are rows × columns × the weights of each (`within`)."""

    rows: int
    columns: int
    within: int

    def lose(self, axis: int, number: int) -> int:
        """Take away so many places of an axis; returns the weights that go with them."""
        if axis == 0:
            self.rows -= number
            return number * self.columns * self.within
        self.columns -= number
        return number * self.rows * self.within


def update_channels(
    members: Sequence[Member],
    groups: Sequence[ChannelGroup],
    store: MaskedStore,
    options: PruningOptions,
    step: int,
    group: ProcessGroup | None,
) -> int | None:
    """Remove channels up to the schedule's zeros at `step`; returns the survivors, None where nothing changes.

    Call on all ranks of `group`. Raises ValueError that names a tensor without a score, or where masks of another
    pattern are there.
    """
    check_scored(members, step)
    by_name = {member.name: member for member in members}
    # 1. What the weights at each place of each axis are worth, and how many there are, over the ranks.
    sums, counts = _sums_and_counts(members, store, group)
    alive = [_channel_sums(counts, own) > 0 for own in groups]
    sizes = {member.name: _Size(*_shape(member.parameter)) for member in members}
    whole = {name: size.rows * size.columns * size.within for name, size in sizes.items()}
    for own, left in zip(groups, alive, strict=True):
        for one in own.slices:
            if one.name in sizes:
                sizes[one.name].lose(one.axis, int((~left).sum()) * one.places.shape[1])
    survivors = sum(size.rows * size.columns * size.within for size in sizes.values())
    if survivors != int(sum(counts[name, 0].sum() for name in by_name)):
        raise ValueError(
            "the zeros at hand are not whole channels, so pattern='channel' cannot go on from them; start from a dense "
            "model, or go on with the pattern they were made by"
        )
    # 2. The cheapest channels, as many as the schedule has room for; no layer loses its last.
    room = options.num_zeros_at(step, sum(whole.values())) - (sum(whole.values()) - survivors)
    chosen = _choose(groups, alive, _turns(groups, alive, sums, counts, options), sizes, room)
    if not any(bool(marks.any()) for marks in chosen):
        if step == options.end_step and survivors == sum(whole.values()):
            raise ValueError(
                f"sparsity={options.sparsity} of {survivors} weights is less than any one channel of them, or so many "
                f"as go at once (channel_multiple={options.channel_multiple}); ask for more, or prune by weight"
            )
        return None
    # 3. Apply tensor by tensor.
    gone = {key: torch.zeros(len(vector), dtype=torch.bool) for key, vector in counts.items()}
    for own, left, marks in zip(groups, alive, chosen, strict=True):
        for one in own.slices:
            if one.name in by_name:
                gone[one.name, one.axis][one.places[~left | marks].flatten()] = True
    for member in members:
        if gone[member.name, 0].any() or gone[member.name, 1].any():
            store.apply(member, _drop(member, store, gone[member.name, 0], gone[member.name, 1]), None)
    return sum(size.rows * size.columns * size.within for size in sizes.values())


def most_at_once(groups: Sequence[ChannelGroup], parameters: Mapping[str, Tensor], multiple: int) -> int:
    """The most weights that go at once, of the whole model: a channel's, or those of so many that make a multiple."""
    sizes = {name: _Size(*_shape(parameter)) for name, parameter in parameters.items()}
    return max(
        (
            sum(replace(sizes[one.name]).lose(one.axis, one.places.shape[1]) for one in own.slices if one.name in sizes)
            * own.channels_in(multiple)
            for own in groups
            if own.channels_in(multiple) < own.count  # the others keep all
        ),
        default=0,
    )


def _turns(
    groups: Sequence[ChannelGroup], alive: Sequence[Tensor], sums: _Vectors, counts: _Vectors, options: PruningOptions
) -> list[tuple[float, int, int, list[int]]]:
    """(rank, group, channels of it that go before, channels that go at once), the next to go first."""
    turns = []
    for number, (own, present) in enumerate(zip(groups, alive, strict=True)):
        # Rounded: ranks add up in another order than one does.
        scores = (_channel_sums(sums, own) / _channel_sums(counts, own).clamp(min=1)).float().double()
        order = [channel for channel in scores.argsort(stable=True).tolist() if present[channel]]
        step = own.channels_in(options.channel_multiple)
        ends = range(len(order) % step or step, len(order) + 1, step)
        for begin, end in pairwise([0, *ends]):
            channels = order[begin:end]
            rank = float(scores[channels].mean())
            if options.scope == "layer":  # the share of the group that is gone when half of them is
                rank = (own.count - len(order) + (begin + end) / 2) / own.count
            turns.append((rank, number, begin, channels))
    return sorted(turns)


def _choose(
    groups: Sequence[ChannelGroup],
    alive: Sequence[Tensor],
    turns: Sequence[tuple[float, int, int, list[int]]],
    sizes: dict[str, _Size],
    room: int,
) -> list[Tensor]:
    """Marks of the channels that go, bool [count] of each group; `sizes` become those after it."""
    chosen = [torch.zeros(own.count, dtype=torch.bool) for own in groups]
    left = [int(marks.sum()) for marks in alive]
    for _, number, _, channels in turns:
        if left[number] == len(channels):
            continue
        slices = [one for one in groups[number].slices if one.name in sizes]
        lost = sum(sizes[one.name].lose(one.axis, one.places.shape[1] * len(channels)) for one in slices)
        if lost > room:
            for one in reversed(slices):
                sizes[one.name].lose(one.axis, -one.places.shape[1] * len(channels))
            break
        room -= lost
        left[number] -= len(channels)
        chosen[number][channels] = True
    return chosen


def _channel_sums(vectors: _Vectors, own: ChannelGroup) -> Tensor:
    """float64 [count]: of each channel of a group the sum over all its places."""
    total = torch.zeros(own.count, dtype=torch.float64)
    for one in own.slices:
        if (one.name, one.axis) in vectors:
            total += vectors[one.name, one.axis][one.places].sum(1)
    return total


def _shape(parameter: Tensor) -> tuple[int, int, int]:
    """(rows, columns, weights within each) of the whole parameter."""
    rows, columns, *kernel = parameter.shape
    return rows, columns, math.prod(kernel)


def _sums_and_counts(
    members: Sequence[Member], store: MaskedStore, group: ProcessGroup | None
) -> tuple[_Vectors, _Vectors]:
    """Of scores, and of survivors."""
    device = members[0].part.device
    vectors = []
    for member in members:
        scores, keep = _dense_scores(member, store)
        first = first_weight(member.parameter) // max(1, math.prod(member.parameter.shape[1:]))
        for values in (scores, keep):
            for axis in _AXES:
                others = [other for other in range(values.ndim) if other != axis]
                part = values.sum(others, dtype=torch.float64)
                whole = torch.zeros(member.parameter.shape[axis], dtype=torch.float64, device=device)
                begin = first if axis == 0 else 0
                whole[begin : begin + len(part)] = part
                vectors.append(whole)
    together = torch.cat(vectors)
    if group is not None:
        torch.distributed.all_reduce(together, group=group)
    parts = iter(together.cpu().split([len(vector) for vector in vectors]))
    sums: _Vectors = {}
    counts: _Vectors = {}
    for member in members:
        own, kept = ({(member.name, axis): next(parts) for axis in _AXES} for _ in range(2))
        if not all(bool(vector.isfinite().all()) for vector in own.values()):
            raise ValueError(
                f"the pruning score of {member.name} is not finite; its weights, moments or gradients are not"
            )
        sums |= own
        counts |= kept
    return sums, counts


def _dense_scores(member: Member, store: MaskedStore) -> tuple[Tensor, Tensor]:
    """(scores, marks of survivors) of this rank's part, in its shape; a weight that is pruned or 0 scores 0."""
    part, mask = member.part, member.mask
    keep = torch.ones_like(part, dtype=torch.bool)
    if mask is not None:
        flat_view(keep).copy_(unpack_bits(mask, part.numel()))
    scores = torch.zeros_like(part, dtype=torch.float32)
    (pieces,) = cut([member])
    own = torch.cat([part.new_zeros(0, dtype=torch.float32), *(store.scores([piece]) for piece in pieces)])
    own.masked_fill_(own <= LOWEST, 0.0)
    if mask is None or store.pruned_compete:
        flat_view(scores).copy_(own)
        scores.mul_(keep)
    else:
        flat_view(scores).masked_scatter_(flat_view(keep), own)
    return scores, keep


def _drop(member: Member, store: MaskedStore, rows: Tensor, columns: Tensor) -> Tensor:
    """bool [candidates]: those in rows or columns that are gone."""
    part = member.part
    first = first_weight(member.parameter) // max(1, math.prod(member.parameter.shape[1:]))
    own = rows[first : first + part.shape[0]].to(part.device)
    kernel = [1] * (part.ndim - 2)
    marks = torch.zeros_like(part, dtype=torch.bool)
    marks |= own.view(-1, 1, *kernel) | columns.to(part.device).view(1, -1, *kernel)
    flat = flat_view(marks)
    if member.mask is None or store.pruned_compete:
        return flat
    return flat[unpack_bits(member.mask, part.numel())]
