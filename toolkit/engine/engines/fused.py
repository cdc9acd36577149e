"""The optimizer's step fused into backward: each parameter is updated as soon as its gradient is there.

The gradient is freed at once, so that instead of all gradients only the largest lives. The optimizer is shown one
parameter at a time, and small ones (norms, biases: two thirds of ResNet-50's tensors, 0.2 % of its weights) together
when backward is done: a call costs the host of a GPU about as much as a layer's backward. Where masks change, which
takes all gradients or scores together, the step is an ordinary one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.engines.ddp import Engine
from toolkit.memory.activations import FREED_AT_ONCE
from toolkit.memory.probe import StepProbe
from toolkit.prune.pruning import Pruning

_LISTS = ("params", "param_names")  # of a group: an entry a parameter; the rest are settings of all


class FusedEngine(Engine):
    """See Engine: one rank's, with the update inside backward where no mask update is due."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._fused = FusedBackward(self.inner_optimizer)

    def updates_in_backward(self, step: int) -> bool:
        return not self._fused.takes_all(step)

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        self._fused.backward(step, partial(super().backward, loss, step, last=last), probe)

    def update(self, step: int, want_norm: bool) -> Tensor | None:
        return None if self.updates_in_backward(step) else super().update(step, want_norm)


class FusedBackward:
    """Updates `optimizer` within backward, but at the steps at which its masks change."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._pruning: Pruning | None = getattr(optimizer, "pruning", None)
        self._active = False
        self._probe: StepProbe | None = None
        # What the optimizer is shown at a time, with its group's settings of the step: a parameter alone, or the
        # small ones of a group. And the group by number, for a load puts new dictionaries in the groups' place.
        self._alone: dict[Tensor, tuple[int, dict[str, Any]]] = {}
        self._small: list[tuple[int, dict[str, Any]]] = []
        for position, group in enumerate(optimizer.param_groups):
            small = []
            for number, parameter in enumerate(group["params"]):
                parameter.register_post_accumulate_grad_hook(self._update)
                if parameter.numel() < FREED_AT_ONCE:
                    small.append(number)
                else:
                    self._alone[parameter] = (position, group | _entries(group, [number]))
            if small:
                self._small.append((position, group | _entries(group, small)))

    def backward(self, step: int, backward: Callable[[], None], probe: StepProbe | None = None) -> bool:
        """Run `backward` of optimizer step `step`; returns whether the update was made in it."""
        if self.takes_all(step):
            backward()
            return False
        for position, shown in (*self._alone.values(), *self._small):
            shown.update(_settings(self._optimizer.param_groups[position]))
        self._active, self._probe = True, probe
        try:
            backward()
            for position, shown in self._small:
                self._step(position, shown)
        finally:
            self._active, self._probe = False, None
        return True

    def takes_all(self, step: int) -> bool:
        """Whether all parameters are needed together; at the schedule's own steps the loop compares masks too."""
        pruning = self._pruning
        return pruning is not None and (pruning.is_due(step) or pruning.schedule.is_update_step(step))

    def _update(self, parameter: Tensor) -> None:
        if not self._active:
            return
        if self._probe is not None and parameter.grad is not None:
            self._probe.name("gradients", parameter.grad)
        if parameter in self._alone:
            self._step(*self._alone[parameter])

    def _step(self, position: int, shown: dict[str, Any]) -> None:
        every = self._optimizer.param_groups
        self._optimizer.param_groups = [shown]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = every
        for parameter in shown["params"]:
            parameter.grad = None
        every[position].update(_settings(shown))  # what a step counts in its group


def _entries(group: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    return {key: [group[key][number] for number in numbers] for key in _LISTS if key in group}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _LISTS}
