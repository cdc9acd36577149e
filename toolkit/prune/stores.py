"""What optimizers keep for their prunable weights, as a mask update sees it: packed moments, or masked weights."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from toolkit.prune.mask import drop_survivors, flat_view, pack_bits, unpack_bits, zero_pruned
from toolkit.prune.packing import block_offsets, pack, pack_range, survivors_before, unpack
from toolkit.prune.scores import MAGNITUDE, STATE_SCORES, displacement
from toolkit.prune.update import Member, chunk_borders, gradient_of


def _chunks_of_survivors(
    member: Member, first: int, last: int, score: Callable[[Tensor, int, int], Tensor]
) -> Iterator[Tensor]:
    """`score(survivors' weights, start, stop)` of each chunk, with -inf for survivors that are exactly 0."""
    weight = flat_view(member.part)
    for start, stop in chunk_borders(first, last):
        survivors = pack_range(weight, member.mask, start, stop)
        yield score(survivors, start, stop).masked_fill_(survivors == 0, -torch.inf)


class PackedStore:
    """Weights, and `moments` in the state that are kept for survivors only. See Store."""

    pruned_compete = False

    def __init__(self, score: str, moments: Sequence[str]) -> None:
        self._score = STATE_SCORES[score]
        self._moments = moments

    def scores(self, member: Member, first: int, last: int) -> Iterator[Tensor]:
        """The score of weights and moments."""
        moments = {key: flat_view(member.state[key]) for key in self._moments if key in member.state}
        at = survivors_before(member.mask, first)

        def score(survivors: Tensor, start: int, stop: int) -> Tensor:
            nonlocal at
            at += survivors.numel()
            return self._score(survivors, {key: value[at - survivors.numel() : at] for key, value in moments.items()})

        return _chunks_of_survivors(member, first, last, score)

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Pack the moments again; weights that go become 0, weights that come back start at 0."""
        part, state, n = member.part, member.state, member.part.numel()
        stay = pack_bits(~drop)
        mask = stay if member.mask is None else drop_survivors(state["mask"], n, drop)
        left = survivors_before(mask, n)
        keys = [key for key in self._moments if key in state]
        for key in keys:
            state[key] = pack(flat_view(state[key]), stay, left)
        if grow is not None and bool(grow.any()):
            new = torch.zeros(n, dtype=torch.bool, device=part.device)
            new[~unpack_bits(state["mask"], n)] = grow
            after = pack_bits(unpack_bits(mask, n) | new)
            for key in keys:
                dense = _with_new(key, member, unpack(state[key], mask, n), new)
                state[key] = pack(dense, after, left + int(grow.sum()))
            mask = after
        state["mask"] = mask
        state["offsets"], _ = block_offsets(mask, n)
        zero_pruned(flat_view(part), mask)


def _with_new(key: str, member: Member, dense: Tensor, new: Tensor) -> Tensor:
    """Moments of weights that come back: momentum 0, second moments the gradient's square.

    With v = 0 the first step would be 3 times a settled one, (1 - beta1) / sqrt(1 - beta2); so it is a tenth.
    """
    if key.endswith("_sq"):
        dense[new] = flat_view(gradient_of(member))[new].square().to(dense.dtype)
    return dense


class MaskedStore:
    """Weights under a mask, whatever the optimizer keeps; movement's scores and displacement's first weights beside it.

    With movement pruned weights and survivors are ranked together: a resting score that survivors fall below brings its
    weight back, with the value the step at hand has given it from 0. See Store.
    """

    def __init__(self, score: str) -> None:
        self._score = score
        self.pruned_compete = score == "movement"

    def scores(self, member: Member, first: int, last: int) -> Iterator[Tensor]:
        """|w|, movement's running sum, or w (w - w0)."""
        if self._score == "movement":
            return self._movement(member, first, last)
        if self._score == "displacement":
            initial = flat_view(member.state["initial_weights"])
            return _chunks_of_survivors(
                member,
                first,
                last,
                lambda w, start, stop: displacement(w, pack_range(initial, member.mask, start, stop)),
            )
        return _chunks_of_survivors(member, first, last, lambda w, start, stop: MAGNITUDE["magnitude"](w, {}))

    @staticmethod
    def _movement(member: Member, first: int, last: int) -> Iterator[Tensor]:
        weight, scores = flat_view(member.part), flat_view(member.state["scores"])
        for start, stop in chunk_borders(first, last):
            # The optimizer has just moved the pruned weights too; one that it left at 0 has no way back.
            yield scores[start:stop].float().masked_fill(weight[start:stop] == 0, -torch.inf)

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Set the mask; the weights follow after each step."""
        assert grow is None
        keep = pack_bits(~drop)
        within = self.pruned_compete or member.mask is None
        member.state["mask"] = keep if within else drop_survivors(member.state["mask"], member.part.numel(), drop)
