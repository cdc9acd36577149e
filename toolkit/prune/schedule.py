"""When to prune, and to which sparsity: the cubic schedule of Zhu & Gupta (arXiv 1710.01878, eq. 1)."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.prune.patterns import CHANNEL, WEIGHT, n_of_m, sparsity_of


@dataclass(frozen=True)
class Schedule:
    """Target sparsity as a function of the optimizer step; steps count from 1.

    `sparsity` is the final share of zeros in [0, 1), 0 switches pruning off; `pattern` says what goes together
    (toolkit.prune.patterns). Masks change at `begin_step`, every `frequency` steps after it, and last at `end_step`,
    whatever the frequency. Raises ValueError on a bad value.
    """

    sparsity: float = 0.0
    begin_step: int = 0
    end_step: int | None = None
    frequency: int = 50
    pattern: str = WEIGHT

    def __post_init__(self) -> None:
        sparsity_of(self.pattern, self.sparsity)
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

    def _share_left_at(self, step: int) -> float:
        """(1 - p)^3 with p the progress from begin to end: the part of the zeros that is not asked for yet."""
        if not self.enabled or self.end_step is None or step <= self.begin_step:
            return 1.0
        return (1.0 - min(1.0, (step - self.begin_step) / (self.end_step - self.begin_step))) ** 3

    def sparsity_at(self, step: int) -> float:
        """Sparsity asked for at `step`: s_f + (0 - s_f)(1 - p)^3."""
        return self.sparsity - self.sparsity * self._share_left_at(step)

    def num_zeros_at(self, step: int, count: int) -> int:
        """Zeros asked for at `step` among `count` prunable weights; floor(sparsity * count) from end_step on.

        Of N:M all zeros of whole groups, in the end of all; with channels it is what they may not exceed.
        """
        kind = n_of_m(self.pattern)
        return self.num_units_at(step, count // kind.size) * kind.gone if kind else self.num_units_at(step, count)

    def is_reached(self, zeros: int, weights: int) -> bool:
        """Whether a model's zeros are those of end_step.

        Of single weights exactly; of N:M at least, for a survivor may be 0 too; of channels any, as whole ones make
        them, and a start's own zeros may be among them.
        """
        wanted = self.num_zeros_at(self.end_step or 0, weights)
        if self.pattern == CHANNEL:
            return zeros > 0
        return zeros == wanted if self.pattern == WEIGHT else zeros >= wanted

    def num_units_at(self, step: int, count: int) -> int:
        """Units that are to be pruned at `step` among `count`: groups of N:M, else weights."""
        if n_of_m(self.pattern):
            return math.floor((1.0 - self._share_left_at(step)) * count) if self.enabled else 0
        return math.floor(self.sparsity_at(step) * count)


@dataclass(frozen=True)
class PartsSchedule(Schedule):
    """Of a model whose layers have schedules of their own: `parts` are (schedule, prunable weights).

    They share their steps; `sparsity` is what they make together in the end.
    """

    parts: tuple[tuple[Schedule, int], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[tuple[Schedule, int]]) -> "PartsSchedule":
        """The schedule of all parts."""
        one = parts[0][0]
        zeros = sum(part.num_zeros_at(part.end_step or 0, weights) for part, weights in parts)
        share = zeros / max(sum(weights for _, weights in parts), 1)
        return cls(share, one.begin_step, one.end_step, one.frequency, parts=tuple(parts))

    def sparsity_at(self, step: int) -> float:
        """Of all parts together."""
        return self.num_zeros_at(step, 0) / max(sum(weights for _, weights in self.parts), 1)

    def num_zeros_at(self, step: int, count: int) -> int:
        """Of all parts together; `count` is theirs."""
        return sum(part.num_zeros_at(step, weights) for part, weights in self.parts)

    def is_reached(self, zeros: int, weights: int) -> bool:
        """As of one schedule: exactly, and with N:M among the parts at least."""
        wanted = self.num_zeros_at(self.end_step or 0, weights)
        return zeros == wanted if all(part.pattern == WEIGHT for part, _ in self.parts) else zeros >= wanted


def _whole_number(name: str, value: Any) -> int:
    """An int of a Python, NumPy or torch integer, or of a float without a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number of optimizer steps; round it") from None
