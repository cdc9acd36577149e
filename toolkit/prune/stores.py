"""Prunable tensors as a mask update sees them: whole, in pieces, and under masks (packed_store: their moments too)."""

import copy
import functools
import itertools
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.prune.budget import StateBudget
from toolkit.prune.distributed import read_numbers, to_local
from toolkit.prune.mask import drop_survivors, flat_view, pack_bits, zero_pruned
from toolkit.prune.moments import read_piece
from toolkit.prune.packing import Packer, count_survivors, join_bits, join_values, range_bits
from toolkit.prune.scores import Score
from toolkit.prune.select import chunk_size
from toolkit.prune.spans import BLOCK, Ranges, Spans, make_spans, whole_range


class Member:
    """A prunable tensor in a mask update: the optimizer's parameter, this rank's part of it, its state."""

    def __init__(
        self, name: str, parameter: Tensor, state: MutableMapping[str, Tensor], ranges: Ranges | None = None
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.part = to_local(parameter)
        self.state = state
        self.ranges = ranges if ranges is not None else whole_range(parameter, name)

    @functools.cached_property
    def spans(self) -> Spans:
        """Where blocks and groups begin."""
        return make_spans(self.part.numel(), self.ranges)

    @property
    def mask(self) -> Tensor | None:
        """The bits, None while nothing is pruned."""
        return self.state.get("mask")

    @property
    def num_weights(self) -> int:
        """Weights on this rank, without padding."""
        return sum(one.last - one.first for one in self.ranges)


def check_scored(members: Sequence[Member], step: int) -> None:
    """Raise ValueError that names a member of which nothing is known: no gradient ever came to it."""
    for member in members:
        if member.parameter.grad is None and not member.state:
            raise ValueError(
                f"{member.name} is prunable but had no gradient by step {step}, so it has no score; freeze it "
                "(requires_grad=False, out of the optimizer) or mark its group prunable=False"
            )


@dataclass(frozen=True)
class Piece:
    """Weights `first` to `last` of a member, of which `kept` survive; `before` survive before them."""

    member: Member
    first: int
    last: int
    before: int
    kept: int

    @property
    def mask(self) -> Tensor | None:
        """Its bits, None while nothing is pruned."""
        return None if self.member.mask is None else range_bits(self.member.mask, self.first, self.last)

    @property
    def kind(self) -> tuple[object, ...]:
        """What pieces must have in common to be worked on together."""
        member = self.member
        return member.part.device, member.part.dtype, member.mask is None, "offsets" in member.state

    def of(self, values: Tensor) -> Tensor:
        """Its own of something with a value a weight: a view."""
        return flat_view(values)[self.first : self.last]

    def moment(self, key: str, packed: bool) -> Tensor:
        """What the state keeps for its weights, or where it is packed for its survivors."""
        state = self.member.state
        spans, bits, before, kept = self.member.spans, None, self.first, self.last - self.first
        if packed:
            bits, before, kept = self.mask, self.before, self.kept
        return read_piece(state, key, bits, self.first, self.last, before, kept, spans)


def cut(members: Sequence[Member], blocks: Sequence[int] | None = None) -> list[list[Piece]]:
    """Each member whole, padding too, cut where its ranges and chunks end; survivors are counted in one read.

    With `blocks`, a number for each member, in multiples of so many weights.
    """
    borders = []
    for member, block in zip(members, blocks or [1] * len(members), strict=True):
        n, chunk = member.part.numel(), chunk_size(member.part.device)
        ends = {0, n, *range(0, n, max(chunk // block, 1) * block)}
        ends.update(place for one in member.ranges for place in (one.first, one.last))
        if block == 1:
            ends.update(span.first for span in member.spans)
        borders.append(list(itertools.pairwise(sorted(ends))) or [(0, 0)])
    counted = [
        count_survivors(member.mask, first, last)
        for member, pairs in zip(members, borders, strict=True)
        for first, last in pairs
        if member.mask is not None
    ]
    counts = iter(read_numbers(counted))
    made = []
    for member, pairs in zip(members, borders, strict=True):
        pieces: list[Piece] = []
        for first, last in pairs:
            kept = last - first if member.mask is None else next(counts)
            before = pieces[-1].before + pieces[-1].kept if pieces else 0
            pieces.append(Piece(member, first, last, before, kept))
        made.append(pieces)
    return made


def in_blocks(member: Member, offsets: Tensor | None, survivors: int) -> list[Piece]:
    """A member in pieces of whole blocks of its spans, of which `offsets` counts the survivors; None: all survive.

    On a GPU it waits where a tensor has more than one piece.
    """
    n, per_piece = member.part.numel(), max(chunk_size(member.part.device) // BLOCK, 1)
    firsts = [first for span in member.spans for first in range(span.first, span.last, per_piece * BLOCK)]
    if offsets is None:
        starts = firsts
    elif len(firsts) > 1:
        every = [offsets[span.block : span.block + span.blocks : per_piece] for span in member.spans]
        starts = torch.cat(every).tolist()
    else:
        starts = [0] * len(firsts)
    ends = itertools.pairwise([*zip(firsts, starts, strict=True), (n, survivors)])
    return [Piece(member, first, last, before, after - before) for (first, before), (last, after) in ends]


def batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours that are worked on together: on a GPU a chunk's, for it is launches that cost; on CPU each alone."""
    held: list[Piece] = []
    for piece in pieces:
        device = piece.member.part.device
        full = sum(one.last - one.first for one in (*held, piece)) > chunk_size(device)
        if held and (full or device.type == "cpu" or piece.kind != held[0].kind):
            yield held
            held = []
        held.append(piece)
    if held:
        yield held


def pack_pieces(columns: Sequence[Sequence[Tensor]], masks: Sequence[Tensor | None], count: int) -> list[Tensor]:
    """Of each column the values whose bits are set, all where there are none, of one piece behind the other: [count].

    A column has the values of each piece.
    """
    bits = [mask for mask in masks if mask is not None]
    if not bits:
        return [column[0] if len(column) == 1 else torch.cat(list(column)) for column in columns]
    if len(bits) == 1:
        return [*map(Packer(count, bits=bits[0]), (column[0] for column in columns))]
    pack = Packer(count, bits=join_bits(bits, [len(values) for values in columns[0]]))
    return [pack(join_values(column)) for column in columns]


def zero_all_pruned(members: Sequence[Member]) -> None:
    """Set all pruned weights to 0: on a GPU in a few launches for a chunk of tensors together, and without a wait."""
    for batch in batches([Piece(member, 0, member.part.numel(), 0, 0) for member in members]):
        weights = [piece.of(piece.member.part) for piece in batch]
        masks = [piece.mask for piece in batch if piece.mask is not None]
        if len(batch) == 1:
            zero_pruned(weights[0], masks[0])
            continue
        together = join_values(weights)
        zero_pruned(together, join_bits(masks, [len(weight) for weight in weights]))
        sizes = [-(-len(weight) // 8) * 8 for weight in weights]
        parts = [part[: len(weight)] for part, weight in zip(together.split(sizes), weights, strict=True)]
        torch._foreach_copy_(weights, parts)


class MaskedStore:
    """Weights under a mask, whatever the optimizer keeps; `keys` of the state are what the score takes beside them.

    With `pruned_compete` pruned weights and survivors are ranked together: a resting score that survivors fall below
    brings its weight back, with the value the step at hand has given it from 0.

    budget: what the moments of coded parameters must fit into, None without one.
    precision: dtype of those moments by name, None where nobody asked for one.
    """

    budget: StateBudget | None = None
    precision: str | None = None

    def __init__(self, score: Score, keys: Sequence[str], pruned_compete: bool = False) -> None:
        self._score = score
        self._keys = keys
        self.pruned_compete = pruned_compete

    def scoring(self, score: Score) -> "MaskedStore":
        """The same for a mask update by another score of what is kept."""
        other = copy.copy(self)
        other._score = score
        return other

    def count(self, piece: Piece) -> int:
        """How many of its weights compete to stay."""
        return piece.last - piece.first if self.pruned_compete else piece.kept

    def scores(self, pieces: Sequence[Piece]) -> Tensor:
        """Scores of the weights of the pieces that compete, in memory order, one piece behind the other.

        A candidate that is exactly 0 scores -inf. As a survivor it is a zero already, and must be among those asked
        for; a pruned weight that the optimizer, which has just moved them too, has left at 0 has no way back.
        """
        first = pieces[0].member
        packed, keys = "offsets" in first.state, [key for key in self._keys if key in first.state]
        masks, total = [None if self.pruned_compete else piece.mask for piece in pieces], sum(map(self.count, pieces))
        columns = [[piece.of(piece.member.part) for piece in pieces]]
        moments = [[piece.moment(key, packed) for piece in pieces] for key in keys]
        candidates, *values = pack_pieces([*columns, *moments] if not packed else columns, masks, total)
        if packed:
            values = [one[0] if len(one) == 1 else torch.cat(one) for one in moments]
        scores = self._score(candidates, dict(zip(keys, values, strict=True)))
        # A look is a fifth of the filling's cost, but on a GPU it waits.
        if candidates.device.type != "cpu" or int(torch.count_nonzero(candidates)) < len(candidates):
            scores.masked_fill_(candidates == 0, -torch.inf)
        return scores

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Change the mask, and what is kept for the weights it takes away or brings back.

        Here the weights follow after each step.
        """
        assert grow is None
        mask = None if self.pruned_compete else member.mask
        member.state["mask"] = pack_bits(~drop) if mask is None else drop_survivors(mask, member.part.numel(), drop)

    def fit(self, survivors: int) -> None:
        """Choose the precision for so many weights, over all ranks."""
        if self.budget is not None:
            self.precision = self.budget.widest(survivors)

    def settle(self, members: Sequence[Member], survivors: int) -> None:
        """All masks have changed; so many weights are left, over all ranks."""
