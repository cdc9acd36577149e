"""The optimizer's step fused into backward: each parameter is updated as soon as its gradient is there.

The gradient is freed at once, so that instead of all gradients only the largest lives. The optimizer is shown one
parameter at a time; where its masks change, which takes all gradients or scores together, the step is an ordinary one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.memory.probe import StepProbe
from toolkit.prune.pruning import Pruning

__all__ = ["FusedBackward"]


class FusedBackward:
    """Updates `optimizer` within backward, but at the steps at which its masks change."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._pruning: Pruning | None = getattr(optimizer, "pruning", None)
        self._active = False
        self._probe: StepProbe | None = None
        # Each parameter as a group of its own, with its group's settings of the step at hand.
        self._alone: dict[Tensor, tuple[int, dict[str, Any]]] = {}  # (its group's number, which outlives a load)
        for position, group in enumerate(optimizer.param_groups):
            names = group.get("param_names")
            for number, parameter in enumerate(group["params"]):
                alone = {**group, "params": [parameter]}
                if names is not None:
                    alone["param_names"] = [names[number]]
                self._alone[parameter] = (position, alone)
                parameter.register_post_accumulate_grad_hook(self._update)

    def backward(self, step: int, backward: Callable[[], None], probe: StepProbe | None = None) -> bool:
        """Run `backward` of optimizer step `step`; returns whether the update was made in it."""
        if self._takes_all(step):
            backward()
            return False
        for position, alone in self._alone.values():
            alone.update(_settings(self._optimizer.param_groups[position]))
        self._active, self._probe = True, probe
        try:
            backward()
        finally:
            self._active, self._probe = False, None
        if probe is not None:
            probe.backward_done()
        return True

    def _takes_all(self, step: int) -> bool:
        """Whether all parameters are needed together; at the schedule's own steps the loop compares masks too."""
        pruning = self._pruning
        return pruning is not None and (pruning.is_due(step) or pruning.schedule.is_update_step(step))

    def _update(self, parameter: Tensor) -> None:
        if not self._active:
            return
        if self._probe is not None and parameter.grad is not None:
            self._probe.name("gradients", parameter.grad)
        position, alone = self._alone[parameter]
        every = self._optimizer.param_groups
        self._optimizer.param_groups = [alone]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = every
        parameter.grad = None
        every[position].update(_settings(alone))  # what a step counts in its group


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
