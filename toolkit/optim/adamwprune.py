"""AdamWPrune: AdamW that prunes by its own moments and keeps them for the survivors only.

Origin of the idea: mcgrof/AdamWPrune. Update rule: AdamW (arXiv 1711.05101); schedule: Zhu & Gupta (1710.01878);
regrowth: RigL (1911.11134). State of a prunable weight, in bytes, at final sparsity s: 8 (1 - s) for the two moments,
1/8 for the mask bit and 4/1024 for the offset table (2.53 at 70 %, 1.33 in bfloat16); AdamW keeps 8. With sparsity 0
it is AdamW, bit for bit on the reference path.
"""

from typing import Any

import torch
from torch import Tensor

from toolkit.kernels import native
from toolkit.kernels.reference import adam_update
from toolkit.optim.packed import PackedOptimizer, Part, check_adam_options, rate_for

__all__ = ["AdamWPrune"]


class AdamWPrune(PackedOptimizer):
    """AdamW with pruning by moments and packed state.

    `decoupled_weight_decay=False` gives Adam, `amsgrad=True` AMSGrad; their moments are packed alike. Pruning:
    `sparsity` (final share of zeros among the prunable weights, 0 = off), `begin_step`, `end_step` (step of the last
    mask update), `frequency` (steps between updates), `score` (see toolkit.prune.scores), `scope` (global, layer or
    erk), `regrow` (share of the survivors that make way for pruned weights with the largest gradients, decayed by a
    cosine), `state_dtype` (float32, or bfloat16 with stochastic rounding), `implementation` (auto, reference,
    native, triton).
    Raises ValueError on a value out of range.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    SCORES = ("variance", "magnitude", "obd", "saliency", "snr")
    FAST = ("native", "triton")

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
        sparsity: float = 0.0,
        begin_step: int = 0,
        end_step: int | None = None,
        frequency: int = 50,
        score: str = "variance",
        scope: str = "global",
        regrow: float = 0.0,
        state_dtype: str = "float32",
        implementation: str = "auto",
    ) -> None:
        check_adam_options(float(lr), betas, eps, weight_decay)
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
                "sparsity": sparsity,
                "begin_step": begin_step,
                "end_step": end_step,
                "frequency": frequency,
                "score": score,
                "scope": scope,
                "regrow": regrow,
                "state_dtype": state_dtype,
                "implementation": implementation,
            },
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
            **self._rule(group),
        )

    @staticmethod
    def _rule(group: dict[str, Any]) -> dict[str, Any]:
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group["decoupled_weight_decay"],
        }

    def update_many(self, part: Part, group: dict[str, Any]) -> None:
        """torch's fused AdamW or Adam over all dense parameters at once."""
        states = part.states
        fused = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        fused(
            part.parameters,
            self.gradients(part, group),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            part.steps,
            amsgrad=group["amsgrad"],
            lr=rate_for(part, group),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def update_packed(self, part: Part, group: dict[str, Any]) -> None:
        """AdamW for the survivors, all tensors in one call."""
        rows, rule = self.packed_tensors(part, group), self._rule(group)
        if part.how == "triton":
            from toolkit.kernels import triton_packed

            table, lr = self.address_table(part, rows), rate_for(part, group)
            triton_packed.packed_adam(rows, table, part.counter, lr=lr, **rule)
        else:
            native.packed_adam(rows, step=part.step, lr=float(group["lr"]), **rule)
