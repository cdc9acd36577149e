"""What prunes an optimizer: `optimizer.pruning`, the same on those that pack their state and those pruned by hooks."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from toolkit.prune.budget import budget_for
from toolkit.prune.channel_update import most_at_once, update_channels
from toolkit.prune.channels import ChannelGroup
from toolkit.prune.distributed import (
    in_layout_of,
    memory_order,
    read_numbers,
    shard_group,
    sum_over,
    to_local,
)
from toolkit.prune.groups import announce_unmarked, check_fits, prunable_parameters, prunable_parts
from toolkit.prune.mask import count_zeros, flat_view, pack_bits
from toolkit.prune.options import PruningOptions
from toolkit.prune.packing import dense_state
from toolkit.prune.patterns import CHANNEL, WEIGHT
from toolkit.prune.rules import own_options
from toolkit.prune.schedule import Schedule
from toolkit.prune.scores import STATE_SCORES, check_score
from toolkit.prune.spans import Ranges
from toolkit.prune.start import start_quotas, zero_smallest
from toolkit.prune.stores import MaskedStore, Member, cut
from toolkit.prune.units import num_survivors
from toolkit.prune.update import update_masks

_Layout = tuple[torch.Size, tuple[int, ...]]  # shape and stride
_STEP = "prune_step"  # counted in each group: ZeRO shows one group per call of step(), a fused backward one parameter


class Pruning:
    """The pruning of one optimizer: its options, its masks, and what is known of how its parameters are sharded.

    shard_group: the ranks that hold the rest of plain tensors which are slices (ZeRO's); DTensors say it themselves.
    flat_slices: what each slice is made of.
    after_repack: told that what the optimizer keeps was replaced.
    """

    def __init__(self, optimizer: Optimizer, options: PruningOptions, store: MaskedStore) -> None:
        self.optimizer: Optimizer = weakref.proxy(optimizer)  # a cycle would keep the moments until the next collection
        self.options = options
        self.schedule: Schedule = options  # when the masks change, and to how many zeros
        self.shard_group: ProcessGroup | None = None
        self.flat_slices: Mapping[Tensor, Ranges] = {}
        self.after_repack: Callable[[], None] = lambda: None
        self.keeps_zeros = False
        self.channels: list[ChannelGroup] | None = None  # what goes together under pattern channel; None: not said
        self._arrived = False  # whether the masks are known to be those of end_step
        self._store = store
        self._layouts: dict[Tensor, _Layout] = {}  # of the parameters when their masks were made

    def prunable(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) of all prunable parameters, in the order of the groups."""
        return prunable_parameters(self.optimizer.param_groups, self.options.pattern)

    def parts(self) -> list[tuple[PruningOptions, list[tuple[str, Tensor]]]]:
        """What is pruned each for itself: options, and the prunable parameters whose groups ask for them."""
        parts = prunable_parts(self.optimizer.param_groups, self.options.pattern)
        return [(own_options(self.options, own), named) for own, named in parts]

    def known_scores(self) -> tuple[str, ...]:
        """The scores that a part may have."""
        return tuple(self.optimizer.SCORES)  # type: ignore[attr-defined]

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step` takes all prunable parameters together: the masks change, or are checked."""
        return self.schedule.is_update_step(step) or self._must_check(step)

    def _must_check(self, step: int) -> bool:
        """After end_step nothing changes any more; whether the target was reached is looked at once."""
        return self.schedule.enabled and not self._arrived and step > (self.schedule.end_step or 0)

    def member(self, parameter: Tensor, state: MutableMapping[str, Tensor], name: str = "") -> Member:
        """A parameter as a mask update sees it."""
        return Member(name, parameter, state, self.flat_slices.get(parameter))

    def keep_zeros(self) -> None:
        """Weights that are 0 at the first step are pruned from then on: a pruned model goes on."""
        self.keeps_zeros = True

    def start_sparse(self, sparsity: float) -> None:
        """Prune a fresh model before its first step: what is kept is never dense, and `state_budget=auto` is less.

        Of each part floor(sparsity × weights) by |w| within layers of Erdos-Renyi-Kernel densities; the ramp goes on
        where it has more zeros. Call it before an engine takes the model, on every rank, and when a run goes on before
        it loads. Raises ValueError, and changes nothing, where a part ends below `sparsity` or has another pattern,
        training has begun, or a tensor has more zeros of its own than it is to have; after `keep_zeros` they stay.
        """
        sharded = bool(self.flat_slices) or any(to_local(p) is not p for _, p in self.prunable())
        if sharded or self.steps or any(self.optimizer.state.values()):
            raise ValueError("a sparse start is made before the first step, on whole weights; call it earlier")
        to_zero: list[tuple[Tensor, int]] = []
        for options, named in self.parts():
            if options.pattern != WEIGHT or not 0.0 <= sparsity <= options.sparsity:
                raise ValueError(
                    f"a start at sparsity {sparsity} does not fit pattern={options.pattern!r} with sparsity="
                    f"{options.sparsity}; it is for single weights, and no larger than the end"
                )
            owns = [count_zeros([weight.detach()]) for _, weight in named]
            shapes = [tuple(weight.shape) for _, weight in named]
            quotas = start_quotas(shapes, sparsity, owns if self.keeps_zeros else None)
            for (name, weight), own, zeros in zip(named, owns, quotas, strict=True):
                if own > zeros:
                    raise ValueError(
                        f"{name} has {own} zeros of its own, a start at {sparsity} asks for {zeros} of it: which "
                        "are to stay |w| cannot say; initialise it, leave it out (prunable=False, a rule skip), or "
                        "call keep_zeros() first where they are pruned"
                    )
                to_zero.append((weight, zeros))
        for weight, zeros in to_zero:
            zero_smallest(weight, zeros)
        self.keep_zeros()
        if self._store.budget is not None:
            zeros, weights = self.sparsity()
            self._store.budget = self._store.budget.starting_with(zeros)
            self._store.fit(weights - zeros)

    def check_prunable(self) -> None:
        """Raise ValueError where there is nothing to prune; say what will be pruned where no group is marked."""
        if not self.schedule.enabled:
            return
        if not self.prunable():
            raise ValueError(
                f"sparsity={self.schedule.sparsity}, pattern={self.options.pattern}, but no parameter is prunable so; "
                "give weights of more than one dimension (N:M: the second divisible by M), or groups marked "
                "prunable=True (toolkit.optim.param_groups makes them)"
            )
        if self.options.pattern == CHANNEL and not self.channels:
            raise ValueError(
                "pattern='channel' needs to know which channels go together; make the groups by toolkit.optim."
                "param_groups(model, pattern='channel', example_input=images)"
                if self.channels is None
                else "no channels of this model can go, the log says why; use pattern='weight' or N:M"
            )
        if self.options.pattern == CHANNEL:
            multiple = self.options.channel_multiple
            if all(one.channels_in(multiple) >= one.count for one in self.channels or []):
                raise ValueError(
                    f"channel_multiple={multiple}: no layer has more channels than that, so none can go; give less, or "
                    "prune by weight"
                )
        for options, named in self.parts():
            check_fits(named, options.pattern)
            if options.score != self.options.score:
                check_score(str(options.score), self.known_scores())
        announce_unmarked(self.optimizer.param_groups, self.options.pattern)

    def plan_budget(self, num_moments: int) -> None:
        """Take the budget of the parameters there are, as yet whole: an engine cuts them later. Raises ValueError."""
        numels, final_zeros = [parameter.numel() for _, parameter in self.prunable()], 0
        for options, named in self.parts():
            final_zeros += options.num_zeros_at(options.end_step or 0, sum(parameter.numel() for _, parameter in named))
        if self.options.pattern == CHANNEL:  # the last one that has no room any more stays
            step = most_at_once(self.channels or [], dict(self.prunable()), self.options.channel_multiple)
            final_zeros = max(1, final_zeros - step)
        self._store.budget = budget_for(self.options.state_budget, numels, num_moments, final_zeros)
        self._store.fit(sum(numels))

    def fit_loaded(self, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Choose the precision by masks that are about to be loaded. With a budget and shards, call on all ranks."""
        parameters = [parameter for _, parameter in self.prunable()]
        if self._store.budget is None or not parameters:
            return
        kept = [self._num_kept(parameter, saved.get(parameter, {})) for parameter in parameters]
        group = self.shard_group or shard_group(parameters)
        self._store.fit(sum_over(group, [sum(kept)], to_local(parameters[0]).device)[0])

    def _num_kept(self, parameter: Tensor, saved: Mapping[str, Any]) -> int:
        """Weights on this rank that have moments once `saved` is loaded."""
        begins_pruned = not saved and self.keeps_zeros
        part = to_local(parameter if begins_pruned else saved.get("mask", parameter))
        return int(torch.count_nonzero(part)) if begins_pruned or "mask" in saved else part.numel()

    def masks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, bit mask) of every parameter that has one."""
        return ((parameter, state["mask"]) for parameter, state in self.optimizer.state.items() if "mask" in state)

    @torch.no_grad()
    def sparsity(self) -> tuple[int, int]:
        """(zeros, prunable weights) of the model as it is, over the ranks it is sharded over; call on all of them."""
        whole = dict.fromkeys(parameter for _, parameter in self.prunable())
        # ZeRO-3 shows its optimizer a slice only while it steps.
        members = [Member("", tensor, {}, ranges) for tensor, ranges in (self.flat_slices or whole).items()]
        if not members:
            return 0, 0
        parts = [flat_view(member.part)[one.first : one.last] for member in members for one in member.ranges]
        counts = [count_zeros(parts), sum(part.numel() for part in parts)]
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

    @property
    def steps(self) -> int:
        """Optimizer steps counted: a step that a GradScaler leaves out is none. 0 before the first."""
        return max((int(group.get(_STEP, 0)) for group in self.optimizer.param_groups), default=0)

    def _steps_in_state(self, group: Mapping[str, Any]) -> int:
        """Steps behind a group by its parameters' own counters, which have just made the step at hand."""
        steps = [self.optimizer.state[p].get("step") for p in group["params"] if p in self.optimizer.state]
        return max(map(int, read_numbers([torch.as_tensor(step) for step in steps if step is not None])), default=1) - 1

    def update(self, step: int) -> bool:
        """Bring the masks to what is due at `step`; returns whether any was changed. Call on all ranks.

        Raises ValueError after end_step where the masks miss the target.
        """
        states = self.optimizer.state  # a defaultdict: what has no state yet (SGD keeps none) gets a place for its mask
        parts = [(options, [self.member(p, states[p], name) for name, p in named]) for options, named in self.parts()]
        members = [member for _, own in parts for member in own]
        if not members:
            return False
        patterns = {options.pattern for options, _ in parts} - {WEIGHT}
        if patterns and self.flat_slices:
            raise ValueError(
                f"pattern={patterns.pop()!r} needs whole tensors, ZeRO's slices cut them; use DDP or FSDP2"
            )
        if self._must_check(step):
            for options, own in parts:
                self._check_arrived(options, own, step)
            self._arrived = True
            return False
        survivors = self._update_parts(parts, step, self._group(members))
        if survivors is not None:
            self._store.settle(members, survivors)
            self._layouts.update((member.parameter, _layout(member.part)) for member in members)
            self.after_repack()
        self._arrived = step == self.schedule.end_step
        return survivors is not None

    def _update_parts(
        self, parts: list[tuple[PruningOptions, list[Member]]], step: int, group: ProcessGroup | None
    ) -> int | None:
        """Returns the survivors of all parts, None where no mask was changed."""
        left = []
        for options, members in parts:
            if options.pattern == CHANNEL:  # which has no rules, so it is the only part
                return update_channels(members, self.channels or [], self._store, options, step, group)
            own_score = options.score != self.options.score
            store = self._store.scoring(STATE_SCORES[str(options.score)]) if own_score else self._store
            left.append(update_masks(members, store, options, step, group))
        if all(count is None for count in left):
            return None
        rest = [members for count, (_, members) in zip(left, parts, strict=True) if count is None]
        return sum(count or 0 for count in left) + sum(self._counts(members, group)[1] for members in rest)

    @staticmethod
    def _counts(members: list[Member], group: ProcessGroup | None) -> list[int]:
        """[weights, survivors] over all ranks."""
        counts = [sum(m.num_weights for m in members), sum(map(num_survivors, members, cut(members)))]
        return sum_over(group, counts, members[0].part.device)

    def _check_arrived(self, options: PruningOptions, members: list[Member], step: int) -> None:
        weights, survivors = self._counts(members, self._group(members))
        zeros, wanted = weights - survivors, options.num_zeros_at(step, weights)
        if options.pattern == CHANNEL:
            wanted = min(wanted, zeros)  # as many as whole channels make
        if zeros < wanted or (zeros > wanted and not self.keeps_zeros):
            raise ValueError(
                f"step {step} is past end_step={self.schedule.end_step}, the last mask update, but {zeros} of "
                f"{weights} weights are pruned where sparsity={options.sparsity} asks for {wanted}: the state "
                "was made under another schedule, or parameters were added since; load one of this schedule, or give a "
                "later end_step"
            )

    def _group(self, members: list[Member]) -> ProcessGroup | None:
        return self.shard_group or shard_group(member.parameter for member in members)

    def check_layouts(self, parameters: list[Tensor]) -> None:
        """Masks and packed moments are in memory order: raise ValueError where that or the size has changed since."""
        for parameter in parameters:
            now = _layout(to_local(parameter))
            before = self._layouts.setdefault(parameter, now)
            if before != now and _in_memory(*before) != _in_memory(*now):
                (size, order), (new_size, new_order) = _in_memory(*before), _in_memory(*now)
                raise ValueError(
                    f"a parameter of {size} weights had stride {order} when its mask was made, now {new_size} "
                    f"and {new_order}; resize the model or call model.to(memory_format=...) before training, or load a "
                    "checkpoint after it"
                )

    def note_change(self) -> None:
        """The state was replaced, or a parameter may be new: what is pruned is to be looked at again."""
        self._arrived = False

    def pack_loaded_mask(self, parameter: Tensor, mask: Tensor) -> Tensor:
        """A mask of a checkpoint, shaped like the parameter -> bits, in the parameter's memory order of now."""
        part = to_local(parameter)
        self._layouts[parameter] = _layout(part)
        return pack_bits(flat_view(in_layout_of(part, to_local(mask))).to(torch.bool)).to(part.device)


def _layout(part: Tensor) -> _Layout:
    return part.shape, part.stride()


def _in_memory(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Size and strides of what is laid out: what must not change."""
    return shape.numel(), memory_order(shape, stride)


def dense_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict`, as torch makes it, in the plain optimizer's form: see `dense_state`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    flat, held = optimizer.pruning.flat_slices, state_dict["state"].items()  # type: ignore[attr-defined]
    states = {number: dense_state(parameters[number], state, flat.get(parameters[number])) for number, state in held}
    return {**state_dict, "state": states}


def saved_states(
    optimizer: Optimizer, state_dict: Mapping[str, Any], keys: Iterable[str]
) -> dict[Tensor, Mapping[str, Any]]:
    """Each parameter's state as it was saved; torch casts what it loads to the parameter's dtype.

    Raises ValueError where a tensor of `keys` is not shaped like its parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    saved = {p: state_dict["state"].get(number, {}) for p, number in zip(parameters, numbers, strict=False)}
    for index, (parameter, state) in enumerate(saved.items()):
        for key in state.keys() & set(keys):
            if state[key].shape != parameter.shape:
                raise ValueError(
                    f"parameter {index} has shape {tuple(parameter.shape)}, its {key} in the state to load "
                    f"{tuple(state[key].shape)}; they must be alike: load the state of this very model, its parameters "
                    "given in the same order"
                )
    return saved
