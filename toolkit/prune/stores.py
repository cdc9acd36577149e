"""What optimizers keep for their prunable weights, as a mask update sees it: packed moments, or masked weights."""

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from toolkit.prune.distributed import FlatSlices, local_gradient, to_local
from toolkit.prune.mask import drop_survivors, flat_view, mask_bytes, pack_bits, unpack_bits, zero_pruned
from toolkit.prune.packing import block_offsets, pack, pack_range, survivors_before, unpack
from toolkit.prune.scores import Score
from toolkit.prune.select import CHUNK


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
    def gone(self) -> Tensor:
        """The bits of the pruned weights; of bits that belong to no weight there is nothing to be said."""
        none = self.part.new_zeros(mask_bytes(self.part.numel()), dtype=torch.uint8)
        return none if self.mask is None else ~self.mask

    @property
    def num_weights(self) -> int:
        """Weights on this rank, without padding."""
        return sum(last - first for _, first, last in self.ranges)

    @property
    def num_survivors(self) -> int:
        """Weights on this rank that are not pruned."""
        return self.num_weights if self.mask is None else survivors_before(self.mask, self.part.numel())


def chunk_borders(first: int, last: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks of a range, cut at multiples of CHUNK, where a byte of the mask begins."""
    while first < last:
        stop = min((first // CHUNK + 1) * CHUNK, last)
        yield first, stop
        first = stop


class MaskedStore:
    """Weights under a mask, whatever the optimizer keeps; `keys` of the state are what the score takes beside them.

    With `pruned_compete` pruned weights and survivors are ranked together: a resting score that survivors fall below
    brings its weight back, with the value the step at hand has given it from 0.
    """

    def __init__(self, score: Score, keys: Sequence[str], pruned_compete: bool = False) -> None:
        self._score = score
        self._keys = keys
        self.pruned_compete = pruned_compete

    def candidates(self, member: Member) -> Tensor | None:
        """The bits of the weights that compete to stay, None for all."""
        return None if self.pruned_compete else member.mask

    def scores(self, member: Member, first: int, last: int) -> Iterator[Tensor]:
        """Scores of the candidates among the weights `first` to `last`, in memory order, CHUNK weights at a time.

        A candidate that is exactly 0 scores -inf. As a survivor it is a zero already, and must be among those asked
        for; a pruned weight that the optimizer, which has just moved them too, has left at 0 has no way back.
        """
        weight, bits = flat_view(member.part), self.candidates(member)
        kept = {key: flat_view(member.state[key]) for key in self._keys if key in member.state}
        packed, end = "offsets" in member.state, survivors_before(bits, first)
        for start, stop in chunk_borders(first, last):
            candidates = pack_range(weight, bits, start, stop)
            begin, end = end, end + candidates.numel()
            state = {key: v[begin:end] if packed else pack_range(v, bits, start, stop) for key, v in kept.items()}
            scores = self._score(candidates, state)
            if int(torch.count_nonzero(candidates)) < len(candidates):  # a look is a fifth of the filling's cost
                scores.masked_fill_(candidates == 0, -torch.inf)
            yield scores

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Change the mask, and what is kept for the weights it takes away or brings back.

        Here the weights follow after each step.
        """
        assert grow is None
        bits = self.candidates(member)
        member.state["mask"] = pack_bits(~drop) if bits is None else drop_survivors(bits, member.part.numel(), drop)


class PackedStore(MaskedStore):
    """Weights, and moments in the state (`keys`) that are kept for survivors only."""

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Pack the moments again; weights that go become 0, weights that come back start at 0."""
        part, state, n = member.part, member.state, member.part.numel()
        stay = pack_bits(~drop)
        mask = stay if member.mask is None else drop_survivors(state["mask"], n, drop)
        left = survivors_before(mask, n)
        keys = [key for key in self._keys if key in state]
        for key in keys:
            state[key] = pack(flat_view(state[key]), stay, left)
        if grow is not None and bool(grow.any()):
            new = torch.zeros(n, dtype=torch.bool, device=part.device)
            new[~unpack_bits(state["mask"], n)] = grow
            after = pack_bits(unpack_bits(mask, n) | new)
            for key in keys:
                dense = unpack(state[key], mask, n)
                # Momentum begins at 0, second moments at the gradient's square: with v = 0 the first step would be 3
                # times a settled one, (1 - beta1) / sqrt(1 - beta2); so it is a tenth.
                if key.endswith("_sq"):
                    grad = flat_view(local_gradient(member.parameter, part))
                    dense[new] = grad[new].square().to(dense.dtype)
                state[key] = pack(dense, after, left + int(grow.sum()))
            mask = after
        state["mask"] = mask
        state["offsets"], _ = block_offsets(mask, n)
        zero_pruned(flat_view(part), mask)
