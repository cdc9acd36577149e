"""Spread over seeds, and what may be said of a difference. Pure functions over mappings seed -> accuracy."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Difference", "compare", "mean_and_spread", "rank_ranges"]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, sample standard deviation; None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences over common seeds, their standard deviation, and the mean's 95 % interval.

    With fewer than two common seeds there is no spread and nothing can be said: `spread` and `interval` are None.
    """

    mean: float
    spread: float | None
    interval: tuple[float, float] | None
    seeds: int

    @property
    def beyond_spread(self) -> bool:
        """Whether the mean is larger than the paired spread."""
        return self.spread is not None and abs(self.mean) > self.spread

    @property
    def beyond_noise(self) -> bool:
        """Whether the 95 % interval leaves out 0; only then does a report call one of two methods better."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        if self.spread is None or self.interval is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ± {self.spread:.2f} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"


def compare(mine: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Paired by seed (Student's t on the differences). Raises ValueError without a common seed."""
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        raise ValueError(f"no common seed between {sorted(mine)} and {sorted(other)}; run both with the same seeds")
    differences = [mine[seed] - other[seed] for seed in seeds]
    mean, spread = mean_and_spread(differences)
    if spread is None:
        return Difference(mean, None, None, len(seeds))
    from scipy.stats import t

    half = float(t.ppf(0.975, len(seeds) - 1)) * spread / math.sqrt(len(seeds))
    return Difference(mean, spread, (mean - half, mean + half), len(seeds))


def rank_ranges(results: Mapping[str, Mapping[int, float]]) -> dict[str, tuple[int, int]]:
    """(best, worst) rank of each method that its pairwise differences leave open.

    A method ranks below every other that is better beyond noise, and above every other that is worse beyond noise.
    """
    ranges = {}
    for name, mine in results.items():
        found = [compare(mine, other) for rival, other in results.items() if rival != name]
        better = sum(one.beyond_noise and one.mean > 0 for one in found)
        worse = sum(one.beyond_noise and one.mean < 0 for one in found)
        ranges[name] = (1 + worse, len(results) - better)
    return ranges
