"""When to prune, and to which sparsity: the cubic schedule of Zhu & Gupta (arXiv 1710.01878, eq. 1)."""

import math
import operator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Target sparsity as a function of the optimizer step; steps count from 1.

    `sparsity` is the final share of zeros in [0, 1), 0 switches pruning off. Masks change at `begin_step`, every
    `frequency` steps after it, and last at `end_step`, whatever the frequency. Raises ValueError on a bad value.
    """

    sparsity: float = 0.0
    begin_step: int = 0
    end_step: int | None = None
    frequency: int = 50

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity={self.sparsity} must be in [0, 1); 0 switches pruning off")
        if not self.enabled:
            return
        for name in ("begin_step", "end_step", "frequency"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _whole_number(name, value))
        if self.end_step is None:
            raise ValueError(
                f"sparsity={self.sparsity} needs end_step, the optimizer step of the last mask update; "
                "pass end_step=, for example 60 % of all steps"
            )
        if not 0 <= self.begin_step < self.end_step:
            raise ValueError(f"begin_step={self.begin_step} and end_step={self.end_step} must satisfy 0 <= begin < end")
        if self.frequency < 1:
            raise ValueError(f"frequency={self.frequency} must be at least 1 step")

    @property
    def enabled(self) -> bool:
        """Whether anything is ever pruned."""
        return self.sparsity > 0.0

    def is_update_step(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step`."""
        if not self.enabled or self.end_step is None or not self.begin_step <= step <= self.end_step:
            return False
        return step == self.end_step or (step > 0 and (step - self.begin_step) % self.frequency == 0)

    def sparsity_at(self, step: int) -> float:
        """Sparsity asked for at `step`: s_f + (0 - s_f)(1 - p)^3 with p the progress from begin to end."""
        if not self.enabled or self.end_step is None or step <= self.begin_step:
            return 0.0
        progress = min(1.0, (step - self.begin_step) / (self.end_step - self.begin_step))
        return self.sparsity - self.sparsity * (1.0 - progress) ** 3

    def num_zeros_at(self, step: int, count: int) -> int:
        """Zeros asked for at `step` among `count` prunable weights; floor(sparsity * count) from end_step on."""
        return math.floor(self.sparsity_at(step) * count)


def _whole_number(name: str, value: Any) -> int:
    """An int of a Python, NumPy or torch integer, or of a float without a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number of optimizer steps; round it") from None
