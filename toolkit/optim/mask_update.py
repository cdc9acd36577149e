"""One mask update of a packed optimizer: which survivors go, which pruned weights come back, and the re-packing.

Scores are made in chunks from packed moments and never held for all weights; re-packing goes tensor by tensor, so the
transient is one layer.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.prune.distributed import Spans, local, sum_over
from toolkit.prune.distribution import zero_quotas
from toolkit.prune.mask import flat, pack_bits, thin, unpack_bits, zero_pruned
from toolkit.prune.packing import BLOCK, block_offsets, pack, spread
from toolkit.prune.schedule import Schedule
from toolkit.prune.scores import STATE_SCORES
from toolkit.prune.select import CHUNK, choose_lowest, find_threshold

__all__ = ["MaskUpdate", "survivors_of"]

State = MutableMapping[str, Tensor]


def survivors_of(parameter: Tensor, state: Mapping[str, Tensor], moments: Sequence[str]) -> int:
    """Weights of `parameter` that are not pruned."""
    if "offsets" not in state:
        return parameter.numel()
    return next(state[key] for key in moments if key in state).numel()


@dataclass(frozen=True)
class _Piece:
    """What competes under one name: values `first` to `last` of the tensor at `position`, `values()` in chunks."""

    position: int
    name: str
    first: int
    last: int
    values: Callable[[], Iterator[Tensor]]


class MaskUpdate:
    """The change of all masks at one step. `states` is the optimizer's, `options` its pruning options."""

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        states: Mapping[Tensor, State],
        moments: Sequence[str],
        options: Mapping[str, Any],
        schedule: Schedule,
        group: ProcessGroup | None = None,
        spans: Mapping[Tensor, Spans] = MappingProxyType({}),
    ) -> None:
        self.names = [name for name, _ in named]
        self.owners = [parameter for _, parameter in named]
        self.parameters = [local(parameter) for parameter in self.owners]
        self.group = group
        self.states = [states[parameter] for parameter in self.owners]
        self.moments = moments
        self.options = options
        self.schedule = schedule
        self.spans = [spans.get(parameter) for parameter in self.owners]
        self.alive = [survivors_of(p, s, moments) for p, s in zip(self.parameters, self.states, strict=True)]

    def run(self, step: int) -> None:
        """Prune to the schedule's zeros at `step`, regrow the share that is due, pack again."""
        positions = range(len(self.parameters))
        counts = self._over_ranks([self._count(i, self.parameters[i].numel()) for i in positions])
        alive = self._over_ranks([self._count(i, self.alive[i]) for i in positions])
        zeros_now = [count - left for count, left in zip(counts, alive, strict=True)]
        zeros = max(self.schedule.zeros(step, sum(counts)), sum(zeros_now))
        regrown = self._regrown_count(step, sum(counts) - zeros, sum(zeros_now))
        if zeros == sum(zeros_now) and not regrown:
            return
        if self.options["scope"] == "global":
            groups = [(list(range(len(counts))), zeros - sum(zeros_now), regrown)]
        else:
            quotas = zero_quotas(self.options["scope"], [p.shape for p in self.owners], zeros_now, zeros)
            groups = []
            for i, (quota, now) in enumerate(zip(quotas, zeros_now, strict=True)):
                share = self._regrown_count(step, counts[i] - quota, now)
                groups.append(([i], quota - now, share))
        for members, missing, back in groups:
            back = min(back, sum(self._movable(i) for i in members)) if back else 0
            grows = self._choose_regrown(members, back) if back else {}
            pieces = [piece for i in members for piece in self._pieces(i)]
            sources, names = [piece.values for piece in pieces], [piece.name for piece in pieces]
            sizes = [piece.last - piece.first for piece in pieces]
            marks = choose_lowest(sources, names, sizes, missing + back, self.group)
            for position, drop in self._assembled(pieces, marks, self.alive, True):
                self._repack(position, drop, grows.get(position))

    def _count(self, position: int, all_of_it: int) -> int:
        """Weights of a tensor (all, or those alive) without padding, which the first packing leaves behind."""
        spans = self.spans[position]
        if spans is None or ("offsets" in self.states[position] and all_of_it == self.alive[position]):
            return all_of_it
        return sum(stop - start for _, start, stop in spans)

    def _pieces(self, position: int, of_pruned: bool = False) -> list["_Piece"]:
        """The sources that compete: a tensor as it is, or the parameters in a flat slice (whose scores are held)."""
        values = self._pruned_gradients if of_pruned else self._scores
        spans, state, parameter = self.spans[position], self.states[position], self.parameters[position]
        if spans is None:
            size = parameter.numel() - self.alive[position] if of_pruned else self.alive[position]
            return [_Piece(position, self.names[position], 0, size, partial(values, position))]
        held = torch.cat([*values(position), parameter.new_zeros(0, dtype=torch.float32)])
        before = torch.arange(parameter.numel() + 1, device=parameter.device)
        if "offsets" in state:
            alive = unpack_bits(state["mask"], parameter.numel()).cumsum(0)
            alive = torch.cat([alive.new_zeros(1), alive])
            before = before - alive if of_pruned else alive
        elif of_pruned:
            before = torch.zeros_like(before)
        cuts = [(name, int(before[start]), int(before[stop])) for name, start, stop in spans]
        return [_Piece(position, name, first, last, partial(iter, [held[first:last]])) for name, first, last in cuts]

    @staticmethod
    def _assembled(
        pieces: Sequence["_Piece"], marks: Iterator[Tensor], sizes: Sequence[int], padding: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """(position, marks of the whole tensor) from the marks of its pieces; padding is marked as told."""
        for position, members in itertools.groupby(zip(pieces, marks, strict=True), lambda pair: pair[0].position):
            whole: Tensor | None = None
            for piece, mark in members:
                if piece.last - piece.first == sizes[position]:
                    whole = mark
                    continue
                if whole is None:
                    whole = torch.full((sizes[position],), padding, dtype=torch.bool, device=mark.device)
                whole[piece.first : piece.last] = mark
            assert whole is not None
            yield position, whole

    def _over_ranks(self, counts: list[int]) -> list[int]:
        return sum_over(self.group, counts, self.parameters[0].device)

    def _regrown_count(self, step: int, survivors: int, zeros_now: int) -> int:
        """Weights that come back: the share `regrow` of the survivors, decayed by a cosine to 0 at end_step (RigL)."""
        schedule, share = self.schedule, self.options["regrow"]
        if not share or schedule.end_step is None:
            return 0
        progress = min(1.0, (step - schedule.begin_step) / (schedule.end_step - schedule.begin_step))
        wanted = math.floor(share * 0.5 * (1 + math.cos(math.pi * progress)) * survivors)
        return min(wanted, zeros_now, survivors)

    def _movable(self, position: int) -> int:
        """Pruned weights, over all ranks, that a gradient would move; one without would stay a zero."""
        return self._over_ranks([sum(int((piece != 0).sum()) for piece in self._pruned_gradients(position))])[0]

    def _choose_regrown(self, members: Sequence[int], count: int) -> dict[int, Tensor]:
        """The `count` pruned weights with the largest gradients: position -> bool [pruned]."""
        pieces = [piece for i in members for piece in self._pieces(i, of_pruned=True)]
        sources, names = [piece.values for piece in pieces], [piece.name for piece in pieces]
        threshold = find_threshold(sources, names, count, self.group)
        pruned = [parameter.numel() - alive for parameter, alive in zip(self.parameters, self.alive, strict=True)]
        none = self.parameters[0].new_zeros(0, dtype=torch.bool)
        marks = (
            torch.cat([none, *(threshold.take(values, number) for values in piece.values())])
            for number, piece in enumerate(pieces)
        )
        return {i: mark for i, mark in self._assembled(pieces, marks, pruned, False) if "offsets" in self.states[i]}

    def _pruned_gradients(self, position: int) -> Iterator[Tensor]:
        """-|gradient| of a tensor's pruned weights, in memory order."""
        parameter, state = self.parameters[position], self.states[position]
        if "offsets" not in state or self.owners[position].grad is None:
            return
        grad = self._gradient(position)
        for start in range(0, parameter.numel(), CHUNK):
            piece = flat(grad)[start : start + CHUNK]
            keep = unpack_bits(state["mask"][start // 8 : (start + CHUNK) // 8], piece.numel())
            yield -piece[~keep].float().abs()

    def _gradient(self, position: int) -> Tensor:
        """The gradient in its parameter's memory layout."""
        grad, parameter = self.owners[position].grad, self.parameters[position]
        assert grad is not None
        grad = local(grad)
        return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)

    def _scores(self, position: int) -> Iterator[Tensor]:
        """Scores of a tensor's survivors, in memory order, CHUNK weights at a time."""
        score = STATE_SCORES[self.options["score"]]
        parameter, state = self.parameters[position], self.states[position]
        weight = flat(parameter)
        moments = {key: flat(state[key]) for key in self.moments if key in state}
        borders = range(0, parameter.numel(), CHUNK)
        if "offsets" not in state:
            for start in borders:
                part = slice(start, start + CHUNK)
                yield score(weight[part], {key: value[part] for key, value in moments.items()})
            return
        firsts = [*state["offsets"][:: CHUNK // BLOCK].tolist(), self.alive[position]]
        for index, start in enumerate(borders):
            part = slice(firsts[index], firsts[index + 1])
            bits = state["mask"][start // 8 : (start + CHUNK) // 8]
            survivors = pack(weight[start : start + CHUNK], bits, part.stop - part.start)
            yield score(survivors, {key: value[part] for key, value in moments.items()})

    def _repack(self, position: int, drop: Tensor, grow: Tensor | None) -> None:
        """Take the survivors marked in `drop` away, bring the pruned weights marked in `grow` back, at 0."""
        parameter, state = self.parameters[position], self.states[position]
        stay = pack_bits(~drop)
        mask = thin(state["mask"], parameter.numel(), drop) if "offsets" in state else stay
        left = block_offsets(mask, parameter.numel())[1]
        keys = [key for key in self.moments if key in state]
        for key in keys:
            state[key] = pack(flat(state[key]), stay, left)
        if grow is not None and bool(grow.any()):
            before = unpack_bits(state["mask"], parameter.numel())
            new = torch.zeros_like(before)
            new[~before] = grow
            after = pack_bits(unpack_bits(mask, parameter.numel()) | new)
            for key in keys:
                dense = self._with_new(key, position, spread(state[key], mask, parameter.numel()), new)
                state[key] = pack(dense, after, left + int(grow.sum()))
            mask = after
        state["mask"] = mask
        state["offsets"], _ = block_offsets(mask, parameter.numel())
        zero_pruned(flat(parameter), mask)

    def _with_new(self, key: str, position: int, dense: Tensor, new: Tensor) -> Tensor:
        """Moments of weights that come back: momentum 0, second moments the gradient's square.

        With v = 0 the first step would be 3 times a settled one, (1 - beta1) / sqrt(1 - beta2); so it is a tenth.
        """
        if key.endswith("_sq"):
            dense[new] = flat(self._gradient(position))[new].square().to(dense.dtype)
        return dense
