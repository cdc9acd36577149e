"""The optimizer's step fused into backward: each parameter is updated as soon as its gradient is there.

The gradient is freed at once, so that instead of all gradients only the largest lives. The optimizer is shown one
parameter at a time; where its masks change, which takes all gradients or scores together, the step is an ordinary one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.engines.ddp import Engine
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
        # Each parameter as a group of its own, with its group's settings of the step at hand; and its group by number,
        # for a load puts new dictionaries in the groups' place.
        self._alone: dict[Tensor, tuple[int, dict[str, Any]]] = {}
        for position, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                own = {key: [group[key][number]] for key in _LISTS if key in group}
                self._alone[parameter] = (position, group | own)
                parameter.register_post_accumulate_grad_hook(self._update)

    def backward(self, step: int, backward: Callable[[], None], probe: StepProbe | None = None) -> bool:
        """Run `backward` of optimizer step `step`; returns whether the update was made in it."""
        if self.takes_all(step):
            backward()
            return False
        for position, alone in self._alone.values():
            alone.update(_settings(self._optimizer.param_groups[position]))
        self._active, self._probe = True, probe
        try:
            backward()
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
    return {key: value for key, value in group.items() if key not in _LISTS}
