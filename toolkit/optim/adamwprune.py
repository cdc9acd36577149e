"""AdamWPrune: AdamW that prunes by its own moments and keeps them for the survivors only.

Origin of the idea: mcgrof/AdamWPrune. Update rule: AdamW (arXiv 1711.05101); schedule: Zhu & Gupta (1710.01878);
regrowth: RigL (1911.11134). State of a prunable weight, in bytes, at final sparsity s: 8 (1 - s) for the two moments,
1/8 for the mask bit and 4/1024 for the offset table (2.53 at 70 %, 1.33 in bfloat16, 0.74 in int8); AdamW keeps 8.
With sparsity 0 it is AdamW, bit for bit on the reference path.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from toolkit.kernels.reference import adam_update
from toolkit.optim.buckets import Bucket, rate_for
from toolkit.optim.packed import PackedOptimizer
from toolkit.optim.ranges import check_ranges
from toolkit.prune.options import PruningKeywords


class AdamWPrune(PackedOptimizer):
    """AdamW with pruning by moments and packed state.

    Prunable are the parameters of groups marked `prunable=True`, as `toolkit.optim.param_groups` makes them: weights of
    convolution and linear layers. Without any mark it is every parameter with more than one dimension and a leading
    dimension above 1, embeddings included. `optimizer.pruning.sparsity()` gives (zeros, prunable weights).

        optimizer = AdamWPrune(param_groups(model, weight_decay=0.05), lr=1e-3, sparsity=0.7, end_step=6_000)
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        params: parameters, named parameters or groups.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        decoupled_weight_decay: False gives Adam, whose decay is part of the gradient.
        sparsity: final share of zeros among the prunable weights, 0 (off) to below 1.
        begin_step: optimizer step of the first mask update.
        end_step: step of the last one; the zeros are then exactly floor(sparsity × prunable weights), and stay.
        frequency: steps between mask updates.
        score: what a weight is worth; variance, magnitude, obd, saliency or snr. See toolkit.prune.scores.
        scope: where weights compete: global (all layers together), layer, or erk.
        regrow: share of the survivors that make way for pruned weights with the largest gradients, decayed by a cosine.
        state_dtype: of the moments: float32, bfloat16 with stochastic rounding, or int8 (a byte); None is the
            parameter's own.
        implementation: auto, reference, native (C++ on CPU) or triton (GPU).

    Raises ValueError on a value out of range, TypeError that lists the options for an unknown one.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    SCORES = ("variance", "magnitude", "obd", "saliency", "snr")
    FAST = ("native", "triton")
    KERNEL = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        **pruning: Unpack[PruningKeywords],
    ) -> None:
        check_ranges(betas, lr=float(lr), eps=eps, weight_decay=weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
            },
            pruning,
        )

    def moment_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Adam's two moments, and AMSGrad's third."""
        return self.MOMENTS if group["amsgrad"] else self.MOMENTS[:2]

    def update(
        self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        """AdamW on equally shaped tensors."""
        adam_update(
            weight,
            grad,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments.get("max_exp_avg_sq"),
            step=step,
            lr=group["lr"],
            **self.rule(group, step),
        )

    def rule(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        """AdamW's hyper-parameters."""
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group["decoupled_weight_decay"],
        }

    def update_dense(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """torch's fused AdamW or Adam over all dense parameters at once."""
        states = bucket.states
        fused = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        fused(
            bucket.parameters,
            bucket.gradients(group),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            bucket.steps,
            amsgrad=group["amsgrad"],
            lr=rate_for(bucket, group),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
