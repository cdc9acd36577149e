"""How much a weight is worth. One table, each formula once; the lowest scores are pruned.

A score is a pure function of equally shaped tensors (weight and what the optimizer keeps for it) and returns float32.
Multiplying by a power of the second moment instead of dividing by one keeps small values representable: there is no
epsilon under which a score silently turns into plain magnitude.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

__all__ = ["MAGNITUDE", "MOVEMENT_SCORES", "STATE_SCORES", "check_score", "displacement", "movement_increment"]

Score = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def _magnitude(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| (Zhu & Gupta, arXiv 1710.01878)."""
    return weight.float().abs()


def _variance(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| v^(1/4): the square root of |w| times that of the diagonal-Fisher cost |w| sqrt(v)."""
    return weight.float().abs() * state["exp_avg_sq"].float().sqrt().sqrt()


def _obd(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """|w| sqrt(v): ranks as w^2 v, optimal brain damage with Adam's v for the diagonal of the Fisher matrix."""
    return weight.float().abs() * state["exp_avg_sq"].float().sqrt()


MAGNITUDE: dict[str, Score] = {"magnitude": _magnitude}
STATE_SCORES: dict[str, Score] = {"magnitude": _magnitude, "variance": _variance, "obd": _obd}
MOVEMENT_SCORES = ("movement", "displacement")


def movement_increment(weight: Tensor, grad: Tensor, lr: float) -> Tensor:
    """-lr g w: what one step adds to a movement score (Sanh et al., arXiv 2005.07683, eq. 4)."""
    return (weight * grad).mul_(-lr)


def displacement(weight: Tensor, initial: Tensor) -> Tensor:
    """w (w - w0): the study's own score, positive where a weight has moved away from zero since w0."""
    return weight.float() * (weight - initial).float()


def check_score(score: str, valid: tuple[str, ...]) -> None:
    """Raise ValueError that lists `valid` unless `score` is one of them."""
    if score not in valid:
        raise ValueError(f"score={score!r} is not known here; choose one of {', '.join(valid)}")
