"""A budget of bytes for what is kept of each prunable weight: narrow moments while there are many, wide when few.

A packed state grows no more than its dense one where it is coded in 8 bits at first, in 16 when enough weights have
gone, and in 32 at the end. Which fits follows from the number of survivors alone, so all ranks find the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.kernels.narrow import num_groups
from toolkit.prune.mask import mask_bytes
from toolkit.prune.moments import CODED_FROM
from toolkit.prune.packing import offset_bytes

AUTO = "auto"
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "int8": 1}  # from the widest on


@dataclass(frozen=True)
class KeptSizes:
    """What the bytes kept depend on: weights of each prunable parameter (whole, not a shard), moments of a weight."""

    numels: tuple[int, ...]
    num_moments: int
    masked: bool = True  # whether there will be masks

    @property
    def num_weights(self) -> int:
        """All prunable weights."""
        return sum(self.numels)

    def nbytes(self, dtype: str, survivors: int) -> int:
        """The most that moments of `dtype`, masks and offsets take; parameters below CODED_FROM keep float32.

        How many of those parameters' weights survive is not asked: all of them, as far as there are survivors.
        """
        small = min(survivors, sum(numel for numel in self.numels if numel < CODED_FROM))
        moments = _ITEMSIZES[dtype] * (survivors - small) + 4 * small
        if dtype == "int8":
            moments += sum(num_groups(numel) for numel in self.numels if numel >= CODED_FROM)
        masks = sum(mask_bytes(numel) + offset_bytes(numel) for numel in self.numels) if self.masked else 0
        return self.num_moments * moments + masks


class StateBudget:
    """The most bytes that optimizer and pruning keep for the prunable weights, and the precision it leaves room for.

    `asked` is bytes a weight, or `auto`: what float32 survivors take in the end, or in 8 bits all weights there are at
    the start (`start_zeros` are none) where that is more. Raises ValueError where even those do not fit.
    """

    def __init__(self, asked: float | str, sizes: KeptSizes, final_zeros: int, start_zeros: int = 0) -> None:
        self.sizes, self._asked, self._final_zeros = sizes, asked, final_zeros
        weights = max(1, sizes.num_weights)
        least = sizes.nbytes("int8", sizes.num_weights - start_zeros)
        final = sizes.nbytes("float32", sizes.num_weights - final_zeros)
        self.limit_bytes = max(least, final) if asked == AUTO else math.floor(float(asked) * weights)
        if self.limit_bytes < least:
            raise ValueError(
                f"state_budget={asked} bytes a weight is less than the smallest possible, "
                f"{math.ceil(least / weights * 1000) / 1000:.3f}: 8-bit moments, masks and offsets; give that, or auto"
            )

    def starting_with(self, zeros: int) -> "StateBudget":
        """The budget of a model of which so many weights are pruned from the first step on."""
        return StateBudget(self._asked, self.sizes, self._final_zeros, zeros)

    def widest(self, survivors: int) -> str:
        """The dtype of the moments, by name, while so many weights are kept: of more than there may be the narrowest.

        Those come with a dense state that is loaded where the start is sparse.
        """
        fits = (dtype for dtype in _ITEMSIZES if self.sizes.nbytes(dtype, survivors) <= self.limit_bytes)
        return next(fits, "int8")


def check_budget(asked: float | str | None) -> float | str | None:
    """A budget as an option gives it: a number above 0, `auto` or None. Raises ValueError."""
    if asked is None or asked == AUTO:
        return asked
    try:
        number = float(asked)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"state_budget={asked!r} must be bytes a prunable weight, for example 2.53, or {AUTO}")
    return number


def budget_for(
    asked: float | str | None, numels: Sequence[int], num_moments: int, final_zeros: int
) -> StateBudget | None:
    """The budget where one is asked for, and there is anything to keep."""
    if asked is None or not numels or not num_moments:
        return None
    return StateBudget(asked, KeptSizes(tuple(numels), num_moments, final_zeros > 0), final_zeros)
