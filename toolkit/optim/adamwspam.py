"""AdamWSPAM: Adam with spike-aware clipping and momentum reset (SPAM, arXiv 2501.06842), decoupled weight decay.

Per step t, counted from 1, with k the steps since the last reset:
    reset     every `reset_interval` steps both moments are set to 0 (the step count goes on)
    clip      g <- sign(g) sqrt(threshold v) where g^2 > threshold v, v the second moment before this step;
              from step 20 on and not within 20 steps of a reset
    warm-up   the update is scaled by 1 - 0.99 (1 + cos(pi k / (warmup_steps + 1))) / 2 after a reset
    update    Adam's with eps 1e-6, then w <- w - lr weight_decay w
State: Adam's; with pruning it is packed like AdamWPrune's, and two rules keep the reset from spoiling the scores: a
mask update due while the moments recover (the warm-up) waits for the warm-up's end, and a reset whose warm-up would
reach over `end_step` is left out.
"""

import itertools
import math
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from toolkit.log import get_logger
from toolkit.optim.buckets import Bucket
from toolkit.optim.packed import PackedOptimizer
from toolkit.optim.ranges import check_ranges
from toolkit.prune.options import PruningKeywords
from toolkit.prune.pruning import Pruning

GRACE_STEPS = 20  # the paper's code does not clip this soon after the start or a reset: v is still near 0


def spam_clip(grad: Tensor, exp_avg_sq: Tensor, threshold: float) -> Tensor:
    """Gradient with spikes cut to sqrt(threshold v), sign kept (section 3, spike-aware clipping)."""
    bound = (exp_avg_sq * threshold).sqrt_()
    return torch.where(grad * grad > exp_avg_sq * threshold, grad.sign() * bound, grad)


def spam_warmup_scale(steps_since_reset: int, warmup_steps: int) -> float:
    """Cosine factor of the update, 0.01 at a reset and 1 from `warmup_steps` + 1 steps after it on."""
    if steps_since_reset > warmup_steps:
        return 1.0
    return 1.0 - 0.99 * (1.0 + math.cos(math.pi * steps_since_reset / (warmup_steps + 1))) / 2.0


class _PatientPruning(Pruning):
    """The schedule's mask updates; one that falls into a warm-up comes right after it."""

    def is_due(self, step: int) -> bool:
        recovering = cast(AdamWSPAM, self.optimizer).recovering
        if recovering(step):
            return False
        waited = itertools.takewhile(recovering, range(step - 1, 0, -1))
        return super().is_due(step) or any(map(self.schedule.is_update_step, waited))


class AdamWSPAM(PackedOptimizer):
    """SPAM with decoupled weight decay; `sparsity` > 0 adds pruning by moments, packed (see AdamWPrune).

    Args:
        params: parameters, named parameters or groups.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        spike_threshold: the paper's theta, 0 = no clipping. A weight whose first gradient comes after step 20 has
            v = 0, so it is clipped to 0 until the next reset (the paper's own code does the same).
        reset_interval: steps between resets of the moments, the paper's Delta T; 0 = no reset.
        warmup_steps: steps after a reset in which the update is scaled up again, the paper's N.
        sparsity, begin_step, end_step, frequency, score, scope, regrow, state_dtype: as in AdamWPrune.
        implementation: auto, reference, or triton (GPU). A captured step would keep its clipping and warm-up at every
            replay: do not capture it.

    Raises ValueError on a value out of range, TypeError that lists the options for an unknown one.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")
    SCORES = ("variance", "magnitude", "obd", "saliency", "snr")
    FAST = ("triton",)
    KERNEL = "adam"
    PRUNING = _PatientPruning

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        spike_threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        maximize: bool = False,
        **pruning: Unpack[PruningKeywords],
    ) -> None:
        check_ranges(betas, lr=float(lr), eps=eps, weight_decay=weight_decay)
        if spike_threshold < 0:
            raise ValueError(f"spike_threshold={spike_threshold} must be 0 (off) or more")
        if reset_interval and not 0 <= warmup_steps < reset_interval:
            raise ValueError(f"warmup_steps={warmup_steps} must be below reset_interval={reset_interval}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "spike_threshold": spike_threshold,
                "reset_interval": reset_interval,
                "warmup_steps": warmup_steps,
                "maximize": maximize,
            },
            pruning,
        )
        end = self.schedule.end_step or 0
        nearest = end - end % reset_interval if reset_interval else 0
        if self.schedule.enabled and nearest > 0 and not self._reset_at(nearest):
            get_logger().info(
                "SPAM's reset at step %d is left out: its warm-up would cover the last mask update (end_step=%d)",
                nearest,
                end,
            )

    def _reset_at(self, step: int) -> bool:
        """Whether the moments are reset at `step`: every interval, unless the warm-up would cover end_step."""
        interval, schedule = self.defaults["reset_interval"], self.schedule
        if not interval or step == 0 or step % interval:
            return False
        end = schedule.end_step if schedule.enabled else None
        return end is None or not step <= end <= step + self.defaults["warmup_steps"]

    def _steps_since_reset(self, step: int) -> int | None:
        """Steps since the last reset, or None before the first."""
        interval = self.defaults["reset_interval"]
        if not interval:
            return None
        multiples = range(step - step % interval, 0, -interval)
        return next((step - last for last in multiples if self._reset_at(last)), None)

    def recovering(self, step: int) -> bool:
        """Whether the moments are still warming up after a reset."""
        since = self._steps_since_reset(step)
        return since is not None and since <= self.defaults["warmup_steps"]

    def rule(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        """The step's hyper-parameters: of Adam, and where clipping and warm-up stand."""
        since = self._steps_since_reset(step)
        clipped = group["spike_threshold"] and min(step, step if since is None else since) >= GRACE_STEPS
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": True,
            "spike_threshold": group["spike_threshold"] if clipped else math.inf,
            "scale": 1.0 if since is None else spam_warmup_scale(since, group["warmup_steps"]),
        }

    def fused(self, parameter: Tensor, moment_dtype: torch.dtype) -> bool:
        """Torch has no SPAM."""
        return False

    def update_by_kernel(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """SPAM's step on a GPU; a reset, once in many steps, comes before it."""
        if self._reset_at(bucket.step):
            for state in bucket.states:
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        super().update_by_kernel(bucket, group)

    def update(
        self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        """SPAM's step on equally shaped tensors, in place."""
        exp_avg, exp_avg_sq = moments["exp_avg"], moments["exp_avg_sq"]
        (beta1, beta2), lr, rule = group["betas"], float(group["lr"]), self.rule(group, step)
        if self._reset_at(step):
            exp_avg.zero_()
            exp_avg_sq.zero_()
        if rule["spike_threshold"] < math.inf:
            grad = spam_clip(grad, exp_avg_sq, rule["spike_threshold"])
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = rule["scale"] * lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        weight.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(group["eps"]), value=-step_size)
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
