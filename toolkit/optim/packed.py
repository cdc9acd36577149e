"""Bookkeeping of an optimizer that keeps its moments for survivors only; a subclass brings the update rule.

Until the first mask update a parameter's moments are dense and shaped like it. From then on a prunable parameter owns
packed moments [survivors], a bit mask and a block-offset table, and nothing else of the order of its size.
`state_dict()` is dense and parameter-shaped, with the mask as bool, so it loads into the plain optimizer too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from toolkit.prune.groups import prunable_parameters
from toolkit.prune.mask import flat, pack_bits, unpack_bits
from toolkit.prune.packing import BLOCK, block_offsets, drop_from_mask, pack, spread
from toolkit.prune.schedule import Schedule
from toolkit.prune.scores import STATE_SCORES, check_score
from toolkit.prune.select import CHUNK, find_threshold

__all__ = ["IMPLEMENTATIONS", "PRUNING_OPTIONS", "SCOPES", "PackedOptimizer", "check_adam_options"]

SCOPES = ("global",)
IMPLEMENTATIONS = ("auto", "reference")
PRUNING_OPTIONS = (
    "sparsity", "begin_step", "end_step", "frequency", "score", "scope", "implementation",
)  # fmt: skip


def check_adam_options(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError for a hyper-parameter outside its range."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be 0 or more")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}]={beta} must be in [0, 1)")


class PackedOptimizer(Optimizer):
    """Moments for survivors only. Subclasses define `moment_keys` and `update`.

    The pruning options live in `defaults` and, for everyone to see, in each group; those given to the constructor
    are in force, also after a `load_state_dict`.
    """

    MOMENTS: tuple[str, ...] = ()  # every state key a subclass may pack

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_score(defaults["score"], tuple(STATE_SCORES))
        for name, valid in (("scope", SCOPES), ("implementation", IMPLEMENTATIONS)):
            if defaults[name] not in valid:
                raise ValueError(f"{name}={defaults[name]!r} is not known; choose one of {', '.join(valid)}")
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group)
        if self.schedule.on:
            self._prune_if_due()
        return loss

    def _step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse or parameter.is_complex():
            raise ValueError(
                f"{type(self).__name__} takes dense real gradients, not {grad.layout} {grad.dtype}; "
                "use torch.optim.SparseAdam or torch.optim.AdamW for this parameter"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in self.moment_keys(group):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        step = int(state["step"])
        if group["maximize"]:
            grad = -grad
        moments = {key: state[key] for key in self.moment_keys(group)}
        if "mask" not in state:
            self.update(parameter, grad, moments, group, step)
            return
        keep = unpack_bits(state["mask"], parameter.numel())
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter).copy_(grad)
        weight = flat(parameter)
        survivors = pack(weight, keep)
        self.update(survivors, pack(flat(grad), keep), moments, group, step)
        weight[keep] = survivors

    def _prune_if_due(self) -> None:
        """Bring the number of zeros to the schedule's; the lowest scores over all prunable weights go."""
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
        total = sum(parameter.numel() for _, parameter in named)
        alive = sum(self._survivors(parameter) for _, parameter in named)
        missing = self.schedule.zeros(max(steps), total) - (total - alive)
        if missing <= 0:
            return
        sources = [partial(self._scores, parameter) for _, parameter in named]
        threshold = find_threshold(sources, [name for name, _ in named], missing)
        for (_, parameter), source in zip(named, sources, strict=True):
            drops = [threshold.take(scores) for scores in source()]
            self._drop(parameter, torch.cat(drops) if drops else torch.zeros(0, dtype=torch.bool))

    def _moments_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        return {key: state[key] for key in self.MOMENTS if key in state}

    def _survivors(self, parameter: Tensor) -> int:
        state = self.state[parameter]
        return next(iter(self._moments_of(parameter).values())).numel() if "mask" in state else parameter.numel()

    def _scores(self, parameter: Tensor) -> Iterator[Tensor]:
        """Scores of the survivors, in memory order, CHUNK weights at a time."""
        score = STATE_SCORES[self.defaults["score"]]
        state = self.state[parameter]
        weight = flat(parameter)
        moments = {key: flat(value) for key, value in self._moments_of(parameter).items()}
        borders = range(0, parameter.numel(), CHUNK)
        if "mask" not in state:
            for start in borders:
                part = slice(start, start + CHUNK)
                yield score(weight[part], {key: value[part] for key, value in moments.items()})
            return
        firsts = [*state["offsets"][:: CHUNK // BLOCK].tolist(), self._survivors(parameter)]
        for index, start in enumerate(borders):
            piece = weight[start : start + CHUNK]
            keep = unpack_bits(state["mask"][start // 8 : (start + CHUNK) // 8], piece.numel())
            part = slice(firsts[index], firsts[index + 1])
            yield score(piece[keep], {key: value[part] for key, value in moments.items()})

    def _drop(self, parameter: Tensor, drop: Tensor) -> None:
        """Prune the survivors marked in `drop` (bool [survivors]) and pack again, one tensor at a time."""
        state = self.state[parameter]
        if "mask" in state:
            mask, keep = drop_from_mask(state["mask"], parameter.numel(), drop)
        else:
            keep = ~drop
            mask = pack_bits(keep)
        for key, value in self._moments_of(parameter).items():
            state[key] = pack(flat(value), ~drop)
        state["mask"], state["offsets"] = mask, block_offsets(keep)
        flat(parameter).masked_fill_(~keep, 0.0)

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
        if "mask" not in state:
            return state
        keep = unpack_bits(state["mask"], parameter.numel())
        dense = {}
        for key, value in state.items():
            if key == "step":
                dense[key] = value
            elif key != "offsets":
                values = keep if key == "mask" else spread(value, keep)
                dense[key] = torch.empty_like(parameter, dtype=values.dtype)
                flat(dense[key]).copy_(values)
        return dense

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the form `state_dict` gives, or the plain optimizer's, and pack again."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update({key: self.defaults[key] for key in PRUNING_OPTIONS})
        for parameter, state in self.state.items():
            moments = self._moments_of(parameter)
            dense_mask = state.pop("mask", None)
            keep = None if dense_mask is None else flat(torch.empty_like(parameter).copy_(dense_mask)) != 0
            for key, value in moments.items():
                # In the parameter's own memory order, whatever the order it was saved in.
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                if keep is not None:
                    state[key] = pack(flat(state[key]), keep)
            if keep is not None:
                state["mask"], state["offsets"] = pack_bits(keep), block_offsets(keep)
