"""SGDPrune: SGD with momentum that prunes and keeps the momentum of the survivors only.

The same layout as AdamWPrune with another update rule (Sutskever et al. 2013; decoupled decay: arXiv 1711.05101).
State of a prunable weight, in bytes, at final sparsity s: 4 (1 - s) + 1/8 + 4/1024 (1.33 at 70 %); SGD keeps 4. With
sparsity 0 it is torch's SGD, bit for bit on the reference path.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from toolkit.kernels.reference import sgd_update
from toolkit.optim.buckets import Bucket, rate_for
from toolkit.optim.packed import PackedOptimizer
from toolkit.optim.ranges import check_ranges
from toolkit.prune.options import PruningKeywords


class SGDPrune(PackedOptimizer):
    """SGD with momentum, pruned by weight or momentum, packed. What is prunable, and an example: see AdamWPrune.

    Args:
        params: parameters, named parameters or groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD; momentum in (0, 1).
        decoupled_weight_decay: shrink the weights by lr × decay instead of adding the decay to the gradient.
        score: what a weight is worth; magnitude or saliency. See toolkit.prune.scores.
        sparsity, begin_step, end_step, frequency, scope, regrow, state_dtype, implementation: as in AdamWPrune.

    Raises ValueError on a value out of range, TypeError that lists the options for an unknown one.
    """

    MOMENTS = ("momentum_buffer",)
    SCORES = ("magnitude", "saliency")
    FAST = ("native", "triton")
    KERNEL = "sgd"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        **pruning: Unpack[PruningKeywords],
    ) -> None:
        check_ranges(lr=float(lr), weight_decay=weight_decay)
        if not 0 < momentum < 1:
            raise ValueError(
                f"momentum={momentum} must be in (0, 1): without momentum there is no state to pack; use sgd-magnitude"
            )
        if nesterov and dampening:
            raise ValueError(f"nesterov needs dampening 0, not {dampening}")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
            },
            pruning,
        )

    def rule(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        """SGD's hyper-parameters."""
        return {
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "decoupled": group["decoupled_weight_decay"],
        }

    def update(
        self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        """SGD on equally shaped tensors."""
        sgd_update(weight, grad, moments["momentum_buffer"], lr=group["lr"], first=step == 1, **self.rule(group, step))

    def update_dense(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """torch's fused SGD over all dense parameters at once."""
        lr = rate_for(bucket, group)
        decoupled = group["decoupled_weight_decay"]
        if decoupled and group["weight_decay"]:
            torch._foreach_mul_(bucket.parameters, 1 - lr * group["weight_decay"])
        torch._fused_sgd_(
            bucket.parameters,
            bucket.gradients(group),
            [state["momentum_buffer"] for state in bucket.states],
            weight_decay=0.0 if decoupled else group["weight_decay"],
            momentum=group["momentum"],
            lr=lr,
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=bucket.step == 1,
        )
