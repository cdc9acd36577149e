"""Bookkeeping of an optimizer that keeps its moments for survivors only; a subclass brings the update rule.

Until the first mask update a parameter's moments are dense and shaped like it. From then on a prunable parameter owns
packed moments [survivors], a bit mask and a block-offset table, and nothing else of the order of its size.
`state_dict()` is dense and parameter-shaped, with the mask as bool, so it loads into the plain optimizer too.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from toolkit.kernels.choice import IMPLEMENTATIONS, choose_implementation
from toolkit.kernels.rounding import round_to_bfloat16
from toolkit.optim.mask_update import MaskUpdate, survivors_of
from toolkit.prune.dense import dense_state
from toolkit.prune.distributed import Spans, local, shard_group, whole
from toolkit.prune.distribution import SCOPES
from toolkit.prune.groups import prunable_parameters
from toolkit.prune.mask import flat, pack_bits, unpack_bits
from toolkit.prune.packing import block_offsets, pack
from toolkit.prune.schedule import Schedule
from toolkit.prune.scores import check_score

__all__ = ["PRUNING_OPTIONS", "PackedOptimizer", "Part", "check_adam_options", "rate_for"]

PRUNING_OPTIONS = (
    "sparsity",
    "begin_step",
    "end_step",
    "frequency",
    "score",
    "scope",
    "regrow",
    "state_dtype",
    "implementation",
)
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_adam_options(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError for a hyper-parameter outside its range."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be 0 or more")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}]={beta} must be in [0, 1)")


@dataclass
class Part:
    """Parameters of one group that one call updates: by the same code, at the same step, all dense or all packed."""

    how: str  # reference, native or triton
    packed: bool
    step: int = 0  # of the update at hand, from 1
    prunable: bool = False  # whether any of them is
    sharded: bool = False  # whether any is a DTensor
    owners: list[Tensor] = field(default_factory=list)  # the optimizer's parameters, which have the gradients
    parameters: list[Tensor] = field(default_factory=list)  # this rank's part of each
    states: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # each parameter's own counter: views of `counter`
    counter: Tensor = field(default_factory=lambda: torch.zeros(0))
    places: list[int] = field(default_factory=list)  # position among all the optimizer's parameters

    strides: list[tuple[int, ...]] = field(default_factory=list)  # when the masks were made, of packed parameters
    addresses: Any = None  # the table of the Triton kernels

    def share_counter(self) -> None:
        """Make the parameters' counters views of one tensor: 161 additions cost 0.5 ms, one costs nothing.

        Triton's lies on the GPU, where a captured graph can count it.
        """
        device = self.parameters[0].device if self.how == "triton" else "cpu"
        self.counter = torch.stack([state["step"].to(device) for state in self.states])
        self.steps = list(self.counter.unbind())
        for state, step in zip(self.states, self.steps, strict=True):
            state["step"] = step

    def count_step(self) -> None:
        """One step more, in every parameter's state."""
        self.counter.add_(1)
        self.step = self.step + 1 if self.how == "triton" else int(self.steps[0])


@dataclass
class _Plan:
    """A group's parts, kept between steps: sorting 161 tensors anew cost 1.5 ms a step, a tenth of ResNet-50's."""

    ready: list[Tensor]
    state: Any
    parts: list[Part]
    count: int  # of states, those of other groups too

    def serves(self, ready: list[Tensor], state: Any) -> bool:
        """Whether nothing has changed: the same parameters have a gradient, and the states are those known.

        Of the states the number and each part's first are looked at: all 161 would cost a tenth of a step.
        """
        if state is not self.state or len(state) != self.count or len(ready) != len(self.ready):
            return False
        firsts = ((part.owners[0], part.states[0], part.steps[0]) for part in self.parts)
        return all(map(operator.is_, ready, self.ready)) and all(
            state.get(owner) is known and known.get("step") is step for owner, known, step in firsts
        )


def rate_for(part: Part, group: dict[str, Any]) -> Any:
    """The learning rate as a number, or as the tensor it is where reading it would wait for the GPU."""
    lr = group["lr"]
    on_gpu = isinstance(lr, Tensor) and lr.device.type == part.parameters[0].device.type == "cuda"
    return lr if on_gpu else float(lr)


class PackedOptimizer(Optimizer):
    """Moments for survivors only. Subclasses define MOMENTS, SCORES, `moment_keys` and `update`.

    The pruning options live in `defaults` and, for everyone to see, in each group; those given to the constructor
    are in force, also after a `load_state_dict`. A subclass with faster code than `update` says so in FAST and
    overrides `update_many` and `update_packed`.
    """

    MOMENTS: tuple[str, ...] = ()  # every state key a subclass may pack
    SCORES: tuple[str, ...] = ()  # the scores its moments allow
    FAST: tuple[str, ...] = ()  # implementations beside the reference

    # The ranks that hold the rest of plain tensors which are slices (ZeRO's), and what each slice is made of; DTensors
    # say it themselves.
    shard_group: ProcessGroup | None = None
    spans: Mapping[Tensor, Spans] = MappingProxyType({})
    keeps_zeros = False  # weights that are 0 at the first step are pruned from then on: a pruned model goes on
    after_repack: Callable[[], None] | None = None  # told that dense moments were replaced by packed ones

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_score(defaults["score"], self.SCORES)
        valid = {
            "scope": SCOPES,
            "implementation": [name for name in IMPLEMENTATIONS if name in ("auto", "reference", *self.FAST)],
            "state_dtype": tuple(_STATE_DTYPES),
        }
        for name, choices in valid.items():
            if defaults[name] not in choices:
                raise ValueError(f"{name}={defaults[name]!r} is not known; choose one of {', '.join(choices)}")
        if not 0.0 <= defaults["regrow"] < 1.0:
            raise ValueError(f"regrow={defaults['regrow']} is a share of the survivors; use 0 (off) to below 1")
        self._plans: dict[Tensor, _Plan] = {}  # by the first parameter that has a gradient
        self._layouts: dict[Tensor, tuple[int, ...]] = {}  # strides of the parameters when their masks were made
        super().__init__(params, defaults)
        self._number_parameters()
        _ = self.schedule  # refuses a bad schedule here, not at the first step

    def _number_parameters(self) -> None:
        """Positions that do not depend on which groups a caller shows: ZeRO and a fused backward show one at a time."""
        every = (parameter for group in self.param_groups for parameter in group["params"])
        self._places = {parameter: number for number, parameter in enumerate(every, start=1)}

    @property
    def schedule(self) -> Schedule:
        """The pruning schedule in force."""
        return Schedule(**{key: self.defaults[key] for key in ("sparsity", "begin_step", "end_step", "frequency")})

    def moment_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State keys of the moments a parameter of this group keeps."""
        raise NotImplementedError

    def update(
        self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        """One step in place on equally shaped tensors, dense or packed; `step` counts from 1."""
        raise NotImplementedError

    def update_many(self, part: Part, group: dict[str, Any]) -> None:
        """One step of dense float32 parameters by fast code; only called for implementations in FAST."""
        raise NotImplementedError

    def update_packed(self, part: Part, group: dict[str, Any]) -> None:
        """One step of pruned float32 parameters by fast code; see `update_many`."""
        raise NotImplementedError

    def packed_tensors(self, part: Part, group: dict[str, Any]) -> list[Any]:
        """Pruned parameters as the kernels take them: weight, gradient, mask, offsets, moments."""
        keys = self.moment_keys(group)
        grads = self.gradients(part, group)
        return [
            (parameter, grad, state["mask"], state["offsets"], [state[key] for key in keys])
            for parameter, grad, state in zip(part.parameters, grads, part.states, strict=True)
        ]

    @staticmethod
    def address_table(part: Part, tensors: list[Any]) -> Any:
        """The Triton kernels' table for these tensors, kept with the part."""
        from toolkit.kernels.triton_packed import AddressTable

        part.addresses = part.addresses or AddressTable()
        return part.addresses.update(tensors, part.places)

    def mask_update_due(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step`."""
        return self.schedule.due(step)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, then the masks if they are due. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not ready:
                continue
            plan = self._plans.get(ready[0])
            if plan is None or not plan.serves(ready, self.state):
                plan = self._plans[ready[0]] = self._plan(group, ready)
            for part in plan.parts:
                part.count_step()
                if part.packed:
                    self._check_layout(part)
                if part.sharded:  # a move of the module gives a DTensor another local part
                    part.parameters = [local(owner) for owner in part.owners]
                if part.how == "reference":
                    self._update_reference(part, group)
                elif part.packed:
                    self.update_packed(part, group)
                else:
                    self.update_many(part, group)
        if self.schedule.on:
            self._prune_if_due()
        return loss

    def _check_layout(self, part: Part) -> None:
        """Masks and packed moments are in memory order: raise ValueError where that has changed since."""
        if not part.strides:
            part.strides = [self._layouts.setdefault(owner, local(owner).stride()) for owner in part.owners]
        strides = [parameter.stride() for parameter in part.parameters]
        if strides != part.strides:
            before, now = next(pair for pair in zip(part.strides, strides, strict=True) if pair[0] != pair[1])
            raise ValueError(
                f"a parameter had stride {before} when its mask was made, now {now}; call "
                "model.to(memory_format=...) before training, or load a checkpoint after it"
            )

    def _plan(self, group: dict[str, Any], ready: list[Tensor]) -> _Plan:
        """Sort the parameters of a group that have a gradient by the code that updates them."""
        prunable = {id(parameter) for _, parameter in prunable_parameters(self.param_groups)}
        parts: dict[tuple[str, bool, int], Part] = {}
        for parameter in ready:
            state = self._state_of(parameter, group, id(parameter) in prunable)
            how, packed, step = self._implementation(parameter), "offsets" in state, int(state["step"])
            if not packed and self._moment_dtype(parameter) is not torch.float32:
                how = "reference"  # torch's fused update takes no bfloat16 moments of float32 weights
            if how != "reference":
                flat(local(parameter))  # refuses gaps: the kernels walk over memory
            part = parts.setdefault((how, packed, step), Part(how, packed, step))
            part.prunable |= id(parameter) in prunable
            part.sharded |= hasattr(parameter, "to_local")
            part.owners.append(parameter)
            part.parameters.append(local(parameter))
            part.states.append(state)
            part.places.append(self._places.setdefault(parameter, len(self._places) + 1))
        for part in parts.values():
            part.share_counter()
        return _Plan(ready, self.state, list(parts.values()), len(self.state))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._layouts = {}, {}
        self._number_parameters()

    def _state_of(self, parameter: Tensor, group: dict[str, Any], prunable: bool) -> dict[str, Tensor]:
        """The parameter's state, made at its first step."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse or parameter.is_complex():
            raise ValueError(
                f"{type(self).__name__} takes dense real gradients, not {parameter.grad.layout} "
                f"{parameter.grad.dtype}; use torch.optim.SparseAdam or torch.optim.AdamW for this parameter"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            like = local(parameter)
            if prunable and self.keeps_zeros:
                state["mask"] = pack_bits(flat(like) != 0)
                state["offsets"], survivors = block_offsets(state["mask"], like.numel())
                like = like.new_empty(survivors)
            for key in self.moment_keys(group):
                state[key] = torch.zeros_like(like, dtype=self._moment_dtype(parameter))
        return state

    def _moment_dtype(self, parameter: Tensor) -> torch.dtype:
        chosen = _STATE_DTYPES[self.defaults["state_dtype"]]
        return parameter.dtype if chosen is torch.float32 else chosen

    def _implementation(self, parameter: Tensor) -> str:
        if not self.FAST:
            return "reference"
        return choose_implementation(self.defaults["implementation"], parameter, self._moment_dtype(parameter))

    @staticmethod
    def gradients(part: Part, group: dict[str, Any]) -> list[Tensor]:
        """The gradients, each in its parameter's memory layout, negated where the group maximizes."""
        grads = []
        for owner, parameter in zip(part.owners, part.parameters, strict=True):
            assert owner.grad is not None
            grad = local(owner.grad)
            if grad.stride() != parameter.stride():
                grad = torch.empty_like(parameter).copy_(grad)
            grads.append(grad)
        return [-grad for grad in grads] if group["maximize"] else grads

    def _update_reference(self, part: Part, group: dict[str, Any]) -> None:
        grads = self.gradients(part, group)
        for parameter, grad, state, place in zip(part.parameters, grads, part.states, part.places, strict=True):
            kept = {key: state[key] for key in self.moment_keys(group)}
            rounds = self._moment_dtype(parameter) != parameter.dtype
            moments = {key: value.to(parameter.dtype) for key, value in kept.items()} if rounds else kept
            if "offsets" in state:
                weight, mask = flat(parameter), state["mask"]
                count = next(iter(moments.values())).numel()
                survivors = pack(weight, mask, count)
                self.update(survivors, pack(flat(grad), mask, count), moments, group, part.step)
                weight[unpack_bits(mask, weight.numel())] = survivors
            else:
                self.update(parameter, grad, moments, group, part.step)
            if rounds:
                for number, (key, value) in enumerate(moments.items()):
                    # In memory order, so that the noise does not depend on the layout's logical shape.
                    seed = (part.step * 65_537 + place) * 3 + number
                    flat(kept[key]).copy_(round_to_bfloat16(flat(value), seed))

    def _prune_if_due(self) -> None:
        """Bring the number of zeros to the schedule's; the lowest scores go."""
        # The schedule runs on the parameters' own counters: ZeRO calls step() once per group, so a counter kept
        # here would run ahead.
        step = max((part.step for plan in self._plans.values() for part in plan.parts if part.prunable), default=0)
        if not self.mask_update_due(step):
            return
        named = prunable_parameters(self.param_groups)
        for name, parameter in named:
            if not self.state.get(parameter):
                raise ValueError(
                    f"{name} is prunable but had no gradient by step {step}, so it has no score; freeze it "
                    "(requires_grad=False, out of the optimizer) or mark its group prunable=False"
                )
        group = self.shard_group or shard_group(parameter for _, parameter in named)
        MaskUpdate(named, self.state, self.MOMENTS, self.defaults, self.schedule, group, self.spans).run(step)
        self._plans.clear()
        self._layouts.update({parameter: local(parameter).stride() for _, parameter in named})
        if self.after_repack is not None:
            self.after_repack()

    def state_dict(self) -> dict[str, Any]:
        """The plain optimizer's form: moments dense and shaped like the parameter, the mask as bool."""
        packed = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        packed["state"] = {
            index: self._dense_state(parameters[index], state) for index, state in packed["state"].items()
        }
        return packed

    @staticmethod
    def _dense_state(parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        dense = dense_state(local(parameter), state)
        return {key: value if key == "step" else whole(value, parameter) for key, value in dense.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the form `state_dict` gives, or the plain optimizer's, and pack again."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            # What the plain optimizer does not know, and the pruning options in force here.
            group.update({key: value for key, value in self.defaults.items() if key not in group})
            group.update({key: self.defaults[key] for key in PRUNING_OPTIONS})
        for parameter, state in self.state.items():
            if state:
                state.setdefault("step", torch.tensor(1.0))  # torch's SGD counts none; its buffers have begun
            part = local(parameter)
            numel, mask, survivors = part.numel(), None, 0
            if "mask" in state:
                mask = pack_bits(flat(torch.empty_like(part).copy_(local(state["mask"]))) != 0)
                state["mask"] = mask
                state["offsets"], survivors = block_offsets(mask, numel)
                self._layouts[parameter] = part.stride()
            for key in [key for key in self.MOMENTS if key in state]:
                # In the parameter's own memory order, whatever the order it was saved in; torch has cast it.
                dense = torch.empty_like(part, dtype=self._moment_dtype(parameter)).copy_(local(state[key]))
                state[key] = dense if mask is None else pack(flat(dense), mask, survivors)
        if self.after_repack is not None:
            self.after_repack()

    def survivors(self, parameter: Tensor) -> int:
        """How many of a parameter's weights are not pruned; of a sharded one, on this rank."""
        return survivors_of(local(parameter), self.state[parameter], self.MOMENTS)
