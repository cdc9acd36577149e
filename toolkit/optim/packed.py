"""Bookkeeping of an optimizer that keeps its moments for survivors only; a subclass brings the update rule.

Until the first mask update a parameter's moments are dense and shaped like it. From then on a prunable parameter owns
packed moments [survivors], a bit mask and a block-offset table, and nothing else of the order of its size.
`state_dict()` is dense and parameter-shaped, with the mask as bool, so it loads into the plain optimizer too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from toolkit.kernels.choice import IMPLEMENTATIONS, choose_implementation
from toolkit.kernels.rounding import round_to_bfloat16
from toolkit.optim.mask_update import MaskUpdate, survivors_of
from toolkit.prune.groups import prunable_parameters
from toolkit.prune.mask import flat, pack_bits, unpack_bits
from toolkit.prune.packing import block_offsets, pack, spread
from toolkit.prune.schedule import Schedule
from toolkit.prune.scope import SCOPES
from toolkit.prune.scores import check_score

__all__ = ["PRUNING_OPTIONS", "PackedOptimizer", "check_adam_options"]

PRUNING_OPTIONS = (
    "sparsity", "begin_step", "end_step", "frequency", "score", "scope", "regrow", "state_dtype", "implementation",
)  # fmt: skip
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_adam_options(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError for a hyper-parameter outside its range."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be 0 or more")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}]={beta} must be in [0, 1)")


class PackedOptimizer(Optimizer):
    """Moments for survivors only. Subclasses define MOMENTS, SCORES, `moment_keys` and `update`.

    The pruning options live in `defaults` and, for everyone to see, in each group; those given to the constructor
    are in force, also after a `load_state_dict`. A subclass with faster code than `update` says so in FAST and
    overrides `update_many` and `update_packed`.
    """

    MOMENTS: tuple[str, ...] = ()  # every state key a subclass may pack
    SCORES: tuple[str, ...] = ()  # the scores its moments allow
    FAST: tuple[str, ...] = ()  # implementations beside the reference

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
        super().__init__(params, defaults)
        _ = self.schedule  # refuses a bad schedule here, not at the first step

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

    def update_many(self, parameters: list[Tensor], group: dict[str, Any], step: int) -> None:
        """One step of dense float32 parameters by fast code; only called for implementations in FAST."""
        raise NotImplementedError

    def update_packed(self, parameters: list[Tensor], group: dict[str, Any], step: int) -> None:
        """One step of pruned float32 parameters by fast code; see `update_many`."""
        raise NotImplementedError

    def packed_tensors(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Any]:
        """Pruned parameters as the kernels take them: flat weight, flat gradient, mask, offsets, moments."""
        keys = self.moment_keys(group)
        rows = []
        for parameter in parameters:
            state = self.state[parameter]
            moments = [state[key] for key in keys]
            rows.append((flat(parameter), self._flat_grad(parameter, group), state["mask"], state["offsets"], moments))
        return rows

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
        position = 0
        for group in self.param_groups:
            ready = []
            for parameter in group["params"]:
                position += 1
                if parameter.grad is not None:
                    ready.append((position, parameter, self._state_of(parameter, group)))
            if ready:
                torch._foreach_add_([state["step"] for _, _, state in ready], 1)
            fast: dict[tuple[int, bool], list[Tensor]] = {}
            for place, parameter, state in ready:
                if self._implementation(parameter) == "reference":
                    self._update_reference(parameter, group, place)
                else:
                    fast.setdefault((int(state["step"]), "offsets" in state), []).append(parameter)
            for (step, packed), parameters in fast.items():
                (self.update_packed if packed else self.update_many)(parameters, group, step)
        if self.schedule.on:
            self._prune_if_due()
        return loss

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
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
            for key in self.moment_keys(group):
                state[key] = torch.zeros_like(
                    parameter, dtype=self._moment_dtype(parameter), memory_format=torch.preserve_format
                )
        return state

    def _moment_dtype(self, parameter: Tensor) -> torch.dtype:
        chosen = _STATE_DTYPES[self.defaults["state_dtype"]]
        return parameter.dtype if chosen is torch.float32 else chosen

    def _implementation(self, parameter: Tensor) -> str:
        if not self.FAST:
            return "reference"
        plain = self._moment_dtype(parameter) is torch.float32
        return choose_implementation(self.defaults["implementation"], parameter, plain)

    @staticmethod
    def _flat_grad(parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient in the parameter's memory order, negated where the group maximizes."""
        grad = parameter.grad
        assert grad is not None
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        return -flat(grad) if group["maximize"] else flat(grad)

    def _update_reference(self, parameter: Tensor, group: dict[str, Any], position: int) -> None:
        state = self.state[parameter]
        step = int(state["step"])
        kept = {key: state[key] for key in self.moment_keys(group)}
        rounds = self._moment_dtype(parameter) != parameter.dtype
        moments = {key: value.to(parameter.dtype) for key, value in kept.items()} if rounds else kept
        if "offsets" in state:
            weight, mask = flat(parameter), state["mask"]
            count = next(iter(moments.values())).numel()
            survivors = pack(weight, mask, count)
            self.update(survivors, pack(self._flat_grad(parameter, group), mask, count), moments, group, step)
            weight[unpack_bits(mask, weight.numel())] = survivors
        else:
            assert parameter.grad is not None
            self.update(parameter, -parameter.grad if group["maximize"] else parameter.grad, moments, group, step)
        if rounds:
            for number, (key, value) in enumerate(moments.items()):
                # In memory order, so that the noise does not depend on the layout's logical shape.
                seed = (step * 65_537 + position) * 3 + number
                flat(kept[key]).copy_(round_to_bfloat16(flat(value), seed))

    def _prune_if_due(self) -> None:
        """Bring the number of zeros to the schedule's; the lowest scores go."""
        named = prunable_parameters(self.param_groups)
        # The schedule runs on the parameters' own counters: ZeRO calls step() once per group, so a counter kept
        # here would run ahead.
        steps = [int(self.state[parameter]["step"]) for _, parameter in named if self.state.get(parameter)]
        if not steps or not self.mask_update_due(max(steps)):
            return
        for name, parameter in named:
            if not self.state.get(parameter):
                raise ValueError(
                    f"{name} is prunable but had no gradient by step {max(steps)}, so it has no score; freeze it "
                    "(requires_grad=False, out of the optimizer) or mark its group prunable=False"
                )
        MaskUpdate(named, self.state, self.MOMENTS, self.defaults, self.schedule).run(max(steps))

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
        if "offsets" not in state:
            return state
        dense = {}
        for key, value in state.items():
            if key == "step":
                dense[key] = value
            elif key != "offsets":
                numel, mask = parameter.numel(), state["mask"]
                values = unpack_bits(mask, numel) if key == "mask" else spread(value, mask, numel)
                dense[key] = torch.empty_like(parameter, dtype=values.dtype)
                flat(dense[key]).copy_(values)
        return dense

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the form `state_dict` gives, or the plain optimizer's, and pack again."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update({key: self.defaults[key] for key in PRUNING_OPTIONS})
        for parameter, state in self.state.items():
            numel, mask, survivors = parameter.numel(), None, 0
            if "mask" in state:
                mask = pack_bits(flat(torch.empty_like(parameter).copy_(state["mask"])) != 0)
                state["mask"] = mask
                state["offsets"], survivors = block_offsets(mask, numel)
            for key in [key for key in self.MOMENTS if key in state]:
                # In the parameter's own memory order, whatever the order it was saved in; torch has cast it.
                dense = torch.empty_like(parameter, dtype=self._moment_dtype(parameter)).copy_(state[key])
                state[key] = dense if mask is None else pack(flat(dense), mask, survivors)

    def survivors(self, parameter: Tensor) -> int:
        """How many of a parameter's weights are not pruned."""
        return survivors_of(parameter, self.state[parameter], self.MOMENTS)
