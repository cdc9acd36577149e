"""The update rules in plain torch: what every faster implementation is compared with."""

import torch
from torch import Tensor


def _decay(weight: Tensor, grad: Tensor, lr: float | Tensor, weight_decay: float, decoupled: bool) -> Tensor:
    """Weight decay in place where it is `decoupled`; the gradient, with the decay added where it is not."""
    if weight_decay == 0:
        return grad
    if not decoupled:
        return grad.add(weight, alpha=weight_decay)
    weight.mul_(1 - lr * weight_decay)
    return grad


def adam_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: float,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One Adam(W) step in place (arXiv 1412.6980 algorithm 1; decoupled decay: arXiv 1711.05101; AMSGrad: 1904.09237).

    All tensors have one shape: a parameter's, or [k] for the survivors of a pruned one. The order of operations is
    that of `torch.optim.AdamW(foreach=False)`, so the results are the same bits. `max_exp_avg_sq` is AMSGrad's third
    moment or None; `decoupled=False` adds the decay to the gradient as `torch.optim.Adam` does.
    """
    grad = _decay(weight, grad, lr, weight_decay, decoupled)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    bias_correction2_sqrt = (1 - beta2**step) ** 0.5
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = (second.sqrt() / bias_correction2_sqrt).add_(eps)
    step_size = lr / (1 - beta1**step)
    weight.addcdiv_(exp_avg, denominator, value=-step_size)  # a 0-d tensor lr is fine


def sgd_update(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    decoupled: bool,
    first: bool,
) -> None:
    """One step of SGD with momentum in place (Sutskever et al. 2013); `first` starts the buffer with the gradient.

    Shapes as in `adam_update`. The order of operations is that of `torch.optim.SGD(foreach=False)`; `decoupled=True`
    shrinks the weight by lr × decay instead of adding the decay to the gradient (arXiv 1711.05101).
    """
    grad = _decay(weight, grad, lr, weight_decay, decoupled)
    if first:
        momentum_buffer.copy_(grad)
    else:
        momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
    grad = grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    weight.add_(grad, alpha=-lr)  # type: ignore[arg-type]
