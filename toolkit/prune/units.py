"""What competes in a mask update, and what a choice among it means for the weights: single weights, or groups of N:M.

Of a piece of a tensor: n weights in memory order, c candidates (the weights that compete to stay, as the store says),
p pruned weights. Units are counted in memory order too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.prune.distributed import local_gradient
from toolkit.prune.mask import unpack_bits
from toolkit.prune.patterns import LOWEST, NOfM, group_costs, group_losers, neighbour_distance
from toolkit.prune.stores import MaskedStore, Member, Piece, cut, pack_pieces


def num_survivors(member: Member, pieces: Sequence[Piece]) -> int:
    """Weights on this rank that are not pruned; padding counts for nothing, and has no bit once there is a mask."""
    return member.num_weights if member.mask is None else sum(piece.kept for piece in pieces)


class WeightUnits:
    """Each weight is a unit. `keep_one`: no tensor loses all its units."""

    keep_one = True

    def __init__(self, store: MaskedStore) -> None:
        self.store = store
        # Whether pruned units are no candidates any more: they stay, and the others bring what is missing.
        self.done_stay_out = not store.pruned_compete

    def cut(self, members: Sequence[Member]) -> list[list[Piece]]:
        """Each member in pieces that hold whole units."""
        return cut(members)

    def total(self, member: Member) -> int:
        """Units of a member on this rank."""
        return member.num_weights

    def done(self, member: Member, pieces: Sequence[Piece]) -> int:
        """Units that are pruned."""
        return member.num_weights - num_survivors(member, pieces)

    def shape(self, member: Member) -> Sequence[int]:
        """A member's units in its axes."""
        return member.parameter.shape

    def count(self, piece: Piece) -> int:
        """Units that compete."""
        return self.store.count(piece)

    def scores(self, pieces: Sequence[Piece]) -> Tensor:
        """What each competing unit of the pieces is worth; the lowest go."""
        return self.store.scores(pieces)

    def survivors(self, totals: int, chosen: int) -> int:
        """Weights that are left of all units where so many of them are chosen."""
        return totals - chosen

    def count_back(self, piece: Piece) -> int:
        """Units that may come back."""
        return piece.last - piece.first - piece.kept

    def back_scores(self, pieces: Sequence[Piece]) -> Tensor:
        """-|gradient| of each of these; 0 where there is no gradient. The lowest come back."""
        masks = [~piece.mask for piece in pieces if piece.mask is not None]
        if not masks:  # nothing is pruned
            return pieces[0].member.part.new_zeros(0, dtype=torch.float32)
        grads = [_gradient(piece) for piece in pieces]
        return -pack_pieces([grads], masks, sum(map(self.count_back, pieces)))[0].float().abs()

    def places_left(self, back: int) -> int:
        """How many units more have to go where so many come back."""
        return back

    def drops(self, pieces: Sequence[Piece], chosen: Tensor, back: Tensor | None) -> Tensor:
        """bool [c]: the candidates of a whole member that go, by marks of its units."""
        return chosen

    def grows(self, pieces: Sequence[Piece], back: Tensor) -> Tensor:
        """bool [p]: the pruned weights of a whole member that come back."""
        return back


class GroupUnits(WeightUnits):
    """Each group of N:M is a unit. Chosen ones lose M - N weights; in those that have, others may come back for them.

    Groups that have lost theirs compete too, at no cost, so that they are always among the chosen.
    """

    keep_one = False

    def __init__(self, store: MaskedStore, kind: NOfM) -> None:
        super().__init__(store)
        self.kind = kind
        self.done_stay_out = False

    def cut(self, members: Sequence[Member]) -> list[list[Piece]]:
        """In multiples of the weights between which a group lies."""
        return cut(members, [self.kind.size * neighbour_distance(member.part) for member in members])

    def total(self, member: Member) -> int:
        """Groups of a member on this rank."""
        return member.num_weights // self.kind.size

    def done(self, member: Member, pieces: Sequence[Piece]) -> int:
        """Groups of which no more than N are left."""
        if member.mask is None:
            return 0
        return int(torch.stack([torch.count_nonzero(self._is_done(piece)) for piece in pieces]).sum())

    def shape(self, member: Member) -> Sequence[int]:
        """The parameter's shape with its groups instead of its inputs."""
        outputs, inputs, *kernel = member.parameter.shape
        return outputs, inputs // self.kind.size, *kernel

    def count(self, piece: Piece) -> int:
        """All groups."""
        return (piece.last - piece.first) // self.kind.size

    def scores(self, pieces: Sequence[Piece]) -> Tensor:
        """What each group loses if it is chosen."""
        return torch.cat([group_costs(self._dense_scores(piece), self.kind, _distance(piece)) for piece in pieces])

    def survivors(self, totals: int, chosen: int) -> int:
        """Weights that are left of all groups, if each has lost no more than it must."""
        return totals * self.kind.size - chosen * self.kind.gone

    def count_back(self, piece: Piece) -> int:
        """All groups; those in which nothing can come back score 0."""
        return self.count(piece)

    def back_scores(self, pieces: Sequence[Piece]) -> Tensor:
        """-|gradient| of the pruned weight of each group that has the largest, where M - N are pruned."""
        return torch.cat([self._back(piece) for piece in pieces])

    def places_left(self, back: int) -> int:
        """None: each group gives a survivor for what comes back."""
        return 0

    def drops(self, pieces: Sequence[Piece], chosen: Tensor, back: Tensor | None) -> Tensor:
        """The M - N lowest of chosen groups, and the lowest survivor where a weight comes back."""
        gone = []
        for piece, own in zip(pieces, chosen.split([self.count(piece) for piece in pieces]), strict=True):
            scores = self._dense_scores(piece)
            gone.append(group_losers(scores, self.kind.gone, self.kind.size, _distance(piece), own))
        if back is not None:
            for number, own in enumerate(back.split([self.count(piece) for piece in pieces])):
                alive = self._dense_scores(pieces[number], pruned=torch.inf)
                swapped = group_losers(alive, 1, self.kind.size, _distance(pieces[number]), own)
                gone[number] |= swapped
        marks = torch.cat(gone)
        mask = pieces[0].member.mask
        return marks if mask is None or self.store.pruned_compete else marks[unpack_bits(mask, len(marks))]

    def grows(self, pieces: Sequence[Piece], back: Tensor) -> Tensor:
        """Of each marked group the pruned weight with the largest gradient."""
        marks = [
            group_losers(self._pruned_gradients(piece), 1, self.kind.size, _distance(piece), own)
            for piece, own in zip(pieces, back.split([self.count(piece) for piece in pieces]), strict=True)
        ]
        mask = pieces[0].member.mask
        assert mask is not None
        grown = torch.cat(marks)
        return grown[~unpack_bits(mask, len(grown))]

    def _dense_scores(self, piece: Piece, pruned: float = -torch.inf) -> Tensor:
        """float32 [n]: the candidates' scores, `pruned` where a weight is none; zeros come right after pruned ones."""
        scores = self.store.scores([piece]).clamp_(min=LOWEST)
        if piece.mask is None or self.store.pruned_compete:
            return scores
        dense = torch.full((piece.last - piece.first,), pruned, dtype=scores.dtype, device=scores.device)
        return dense.masked_scatter_(unpack_bits(piece.mask, len(dense)), scores)

    def _is_done(self, piece: Piece) -> Tensor:
        """bool [n / M]: whether no more than N of a group are left."""
        assert piece.mask is not None
        alive = unpack_bits(piece.mask, piece.last - piece.first).view(-1, self.kind.size, _distance(piece))
        return (alive.sum(dim=1) <= self.kind.kept).view(-1)

    def _pruned_gradients(self, piece: Piece) -> Tensor:
        """-|gradient| of pruned weights, 0 of the others: float32 [n]."""
        assert piece.mask is not None
        return -_gradient(piece).float().abs().masked_fill(unpack_bits(piece.mask, piece.last - piece.first), 0.0)

    def _back(self, piece: Piece) -> Tensor:
        if piece.mask is None:
            return torch.zeros(self.count(piece), dtype=torch.float32, device=piece.member.part.device)
        best = self._pruned_gradients(piece).view(-1, self.kind.size, _distance(piece)).amin(dim=1).view(-1)
        return best.masked_fill_(~self._is_done(piece), 0.0)


def _distance(piece: Piece) -> int:
    return neighbour_distance(piece.member.part)


def _gradient(piece: Piece) -> Tensor:
    """The gradient of the piece's weights: [n]."""
    member = piece.member
    if member.parameter.grad is None:
        return piece.of(member.part).new_zeros(piece.last - piece.first)
    return piece.of(local_gradient(member.parameter, member.part))
