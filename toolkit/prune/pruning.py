"""What prunes an optimizer: `optimizer.pruning`, the same on those that pack their state and those pruned by hooks."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from toolkit.prune.distributed import FlatSlices, shard_group, sum_over, to_local
from toolkit.prune.groups import announce_unmarked, prunable_parameters
from toolkit.prune.mask import flat_view
from toolkit.prune.options import OPTION_NAMES, PruningOptions
from toolkit.prune.schedule import Schedule
from toolkit.prune.update import Member, Store, update_masks

_STEP = "prune_step"  # counted in each group: ZeRO shows one group per call of step(), a fused backward one parameter


class Pruning:
    """The pruning of one optimizer: its options, its masks, and what is known of how its parameters are sharded.

    shard_group: the ranks that hold the rest of plain tensors which are slices (ZeRO's); DTensors say it themselves.
    flat_slices: what each slice is made of.
    after_repack: told that what the optimizer keeps was replaced.
    """

    def __init__(self, optimizer: Optimizer, options: PruningOptions, store: Store) -> None:
        self.optimizer: Optimizer = weakref.proxy(optimizer)  # a cycle would keep the moments until the next collection
        self.options = options
        self.shard_group: ProcessGroup | None = None
        self.flat_slices: Mapping[Tensor, FlatSlices] = {}
        self.after_repack: Callable[[], None] | None = None
        self.keeps_zeros = False
        self._arrived = False  # whether the masks are known to be those of end_step
        self._store = store
        self._strides: dict[Tensor, tuple[int, ...]] = {}  # of the parameters when their masks were made

    @property
    def schedule(self) -> Schedule:
        """When the masks change, and to how many zeros."""
        return self.options.schedule

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step` takes all prunable parameters together: the masks change, or are checked."""
        return self.schedule.is_update_step(step) or self._must_check(step)

    def _must_check(self, step: int) -> bool:
        """After end_step nothing changes any more; whether the target was reached is looked at once."""
        return self.schedule.enabled and not self._arrived and step > (self.schedule.end_step or 0)

    def keep_zeros(self) -> None:
        """Weights that are 0 at the first step are pruned from then on: a pruned model goes on."""
        self.keeps_zeros = True

    def check_prunable(self) -> None:
        """Raise ValueError where there is nothing to prune; say what will be pruned where no group is marked."""
        if not self.schedule.enabled:
            return
        if not prunable_parameters(self.optimizer.param_groups):
            raise ValueError(
                f"sparsity={self.schedule.sparsity}, but no parameter is prunable; give weights of more than one "
                "dimension, or groups marked prunable=True (toolkit.optim.param_groups makes them)"
            )
        announce_unmarked(self.optimizer.param_groups)

    def masks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, bit mask) of every parameter that has one."""
        for parameter, state in self.optimizer.state.items():
            if "mask" in state:
                yield parameter, state["mask"]

    @torch.no_grad()
    def sparsity(self) -> tuple[int, int]:
        """(zeros, prunable weights) of the model as it is, over the ranks it is sharded over; call on all of them."""
        members = self._members()
        if self.flat_slices:  # ZeRO-3 shows its optimizer a slice only while it steps
            members = [Member("", flat, {}, ranges) for flat, ranges in self.flat_slices.items()]
        parts = [flat_view(member.part)[first:last] for member in members for _, first, last in member.ranges]
        zeros = sum(int((part == 0).sum()) for part in parts)
        if not members:
            return 0, 0
        counts = [zeros, sum(part.numel() for part in parts)]
        return tuple(sum_over(self._group(members), counts, members[0].part.device))  # type: ignore[return-value]

    def count_step(self) -> int:
        """Count an optimizer step in the groups shown; returns its number. Counts that a load left out are made up."""
        groups = [group for group in self.optimizer.param_groups if group["params"]]
        if any("lookahead_k" in group for group in groups):
            raise ValueError(
                "Lookahead revives pruned weights, its slow weights know no mask; use the optimizer without lookahead_"
            )
        known = max((group[_STEP] for group in groups if _STEP in group), default=None)
        for group in groups:
            if _STEP not in group:  # the state of a plain optimizer, or a group that was added
                group[_STEP] = self._steps_in_state(group) if known is None else known
            group[_STEP] += 1
        return max((int(group[_STEP]) for group in groups), default=0)

    def _steps_in_state(self, group: Mapping[str, Any]) -> int:
        """Steps behind a group by its parameters' own counters, which have just made the step at hand."""
        steps = [self.optimizer.state[p].get("step") for p in group["params"] if p in self.optimizer.state]
        return max((int(step) for step in steps if step is not None), default=1) - 1

    def update(self, step: int) -> bool:
        """Bring the masks to what is due at `step`; returns whether any was changed. Call on all ranks.

        Raises ValueError after end_step where the masks miss the target.
        """
        members = self._members(to_change=True)
        if not members:
            return False
        if self._must_check(step):
            self._check_arrived(members, step)
            return False
        changed = update_masks(members, self._store, self.options, step, self._group(members))
        if changed:
            for member in members:
                self.note_strides(member.parameter)
            if self.after_repack is not None:
                self.after_repack()
        self._arrived = step == self.schedule.end_step
        return changed

    def _check_arrived(self, members: list[Member], step: int) -> None:
        counts = [sum(m.num_weights for m in members), sum(m.num_survivors for m in members)]
        weights, survivors = sum_over(self._group(members), counts, members[0].part.device)
        zeros, wanted = weights - survivors, self.schedule.num_zeros_at(step, weights)
        if zeros < wanted or (zeros > wanted and not self.keeps_zeros):
            raise ValueError(
                f"step {step} is past end_step={self.schedule.end_step}, the last mask update, but {zeros} of "
                f"{weights} weights are pruned where sparsity={self.schedule.sparsity} asks for {wanted}: the state "
                "was made under another schedule; load one of this schedule, or give a later end_step"
            )
        self._arrived = True

    def _members(self, *, to_change: bool = False) -> list[Member]:
        """The prunable tensors; `to_change` gives one that has no state yet (SGD keeps none) a place for its mask."""
        states = self.optimizer.state
        if to_change:
            for _, parameter in prunable_parameters(self.optimizer.param_groups):
                _ = states[parameter]  # a defaultdict
        return [
            Member(name, parameter, states.get(parameter, {}), self.flat_slices.get(parameter))
            for name, parameter in prunable_parameters(self.optimizer.param_groups)
        ]

    def _group(self, members: list[Member]) -> ProcessGroup | None:
        return self.shard_group or shard_group(member.parameter for member in members)

    def check_strides(self, parameters: list[Tensor]) -> None:
        """Masks and packed moments are in memory order: raise ValueError where that has changed since."""
        for parameter in parameters:
            now = to_local(parameter).stride()
            before = self._strides.setdefault(parameter, now)
            if before != now:
                raise ValueError(
                    f"a parameter had stride {before} when its mask was made, now {now}; call "
                    "model.to(memory_format=...) before training, or load a checkpoint after it"
                )

    def note_load(self) -> None:
        """The state was replaced: what it prunes is to be looked at again."""
        self._arrived = False

    def note_strides(self, parameter: Tensor) -> None:
        """This parameter's mask was made anew, in its memory order of now."""
        self._strides[parameter] = to_local(parameter).stride()


def saved_states(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[Tensor, Mapping[str, Any]]:
    """Each parameter's state as it was saved; torch casts what it loads to the parameter's dtype."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    states = state_dict["state"]
    return {parameter: states.get(number, {}) for parameter, number in zip(parameters, numbers, strict=False)}


def check_same_options(group: Mapping[str, Any], options: PruningOptions) -> None:
    """Raise ValueError where a parameter group asks for pruning options of its own."""
    for name in OPTION_NAMES:
        if name in group and group[name] != getattr(options, name):
            raise ValueError(
                f"a parameter group has {name}={group[name]!r}, the optimizer {getattr(options, name)!r}; all are "
                "pruned together: leave it out of the group, or use two optimizers"
            )
