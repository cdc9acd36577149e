"""timm's activation checkpointing, with BatchNorm's statistics counted once.

A checkpointed block runs forward twice: once, and again in backward to recompute what it did not keep. BatchNorm would
take the batch into its running statistics both times. Its output does not depend on them in training, so the second
pass has momentum 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Switch checkpointing on. Raises ValueError where timm's model has none."""
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError("it has no set_grad_checkpointing")
        switch(True)
    except AssertionError as error:  # what timm raises for a model without it
        raise ValueError(f"--grad-checkpointing: {name} does not offer it ({error}); leave the flag out") from None
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            _Statistics(module)


class _Statistics:
    """Keeps a BatchNorm's running statistics as they are in a forward pass that runs inside backward.

    They are not put back afterwards: torch ends a recomputation as soon as it has what it needs, and a hook after the
    forward pass may never run.
    """

    def __init__(self, module: _BatchNorm) -> None:
        self._momentum = module.momentum
        module.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, inputs: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # as torch's own checkpointing asks
        module.momentum = 0.0 if in_backward else self._momentum  # type: ignore[assignment]
        if in_backward and module.training and isinstance(module.num_batches_tracked, Tensor):
            module.num_batches_tracked.sub_(1)  # the forward pass adds it again
