"""How much a weight is worth. One table, each formula once; the lowest scores are pruned.

A score is a pure function of equally shaped tensors (weight and what the optimizer keeps for it) and returns float32.
Powers of the second moment multiply instead of dividing where they can, which keeps small values representable: there
is no epsilon under which a score silently turns into plain magnitude.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Score = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def _magnitude(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| (Zhu & Gupta, arXiv 1710.01878)."""
    return weight.float().abs()


def _first_moment(state: Mapping[str, Tensor]) -> Tensor:
    """Adam's first moment or SGD's momentum."""
    return (state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]).float()


def _variance(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| v^(1/4): the square root of |w| times that of the diagonal-Fisher cost |w| sqrt(v)."""
    return weight.float().abs() * state["exp_avg_sq"].float().sqrt().sqrt()


def _obd(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| sqrt(v): ranks as w^2 v, optimal brain damage with Adam's v for the diagonal of the Fisher matrix."""
    return weight.float().abs() * state["exp_avg_sq"].float().sqrt()


def _saliency(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| sqrt(|m|): ranks as w^2 |m|, between magnitude and the first-order change of the loss |w m|."""
    return weight.float().abs() * _first_moment(state).abs().sqrt()


def _snr(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """w^2 |m| / sqrt(v), the predecessor's first score, without its epsilon: 0 where nothing was learned."""
    ratio = _first_moment(state).abs() / state["exp_avg_sq"].float().sqrt()
    return (weight.float().abs() * ratio.nan_to_num_(0.0, 0.0, 0.0)) * weight.float().abs()


STATE_SCORES: dict[str, Score] = {
    "magnitude": _magnitude,
    "variance": _variance,
    "obd": _obd,
    "saliency": _saliency,
    "snr": _snr,
}


def movement_increment(weight: Tensor, grad: Tensor, lr: float) -> Tensor:
    """-lr g w in float32 or wider: what one step adds to a movement score (Sanh et al., arXiv 2005.07683, eq. 4)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)  # a long sum of small numbers
    return (weight.to(dtype) * grad).mul_(-lr)


def _movement(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The running sum of -lr g w."""
    return state["scores"].to(torch.float32, copy=True)


def _displacement(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """w (w - w0): the study's own score, positive where a weight has moved away from zero since w0."""
    return weight.float() * (weight - state["initial_weights"]).float()


HOOK_SCORES: dict[str, Score] = {"magnitude": _magnitude, "movement": _movement, "displacement": _displacement}


def check_score(score: str, valid: tuple[str, ...]) -> None:
    """Raise ValueError that lists `valid` unless `score` is one of them."""
    if score not in valid:
        raise ValueError(f"score={score!r} is not known here; choose one of {', '.join(valid)}")
