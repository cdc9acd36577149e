"""Moments in 8 bits: block floating point, read off the float's own bits, without a root, a division or a table.

256 neighbouring weights share an exponent of 8 bits, that of their largest moment as rounded (the E8M0 scale of OCP's
Microscaling formats, arXiv 2310.10537). Under it a signed moment keeps 1 bit of sign, 4 of exponent and 3 of mantissa,
a squared one 5 and 3; code 0 is exactly 0. k values kept of n weights (k = n while dense):
    codes      uint8 [k]
    exponents  uint8 [ceil(n / 256)]  biased as float32's
    places     int64 [k]              256 × the group a value belongs to + its number among the group's kept values
Signed moments are rounded to nearest. Squared ones move by a thousandth a step where codes lie a twelfth apart: to
nearest they would stand still, so they go up or down by a chance that keeps the mean. In a group the chances are steps
of the golden ratio from a start that is a hash of the group's place in the whole parameter and of the step: the same on
every rank and device, even over the group and independent from step to step. The exponent is taken after rounding: by
that of the exact value a group's largest never rounds up over a power of two, and v stands still below it. What is
above 0 (1.5e-39) never becomes 0: a denominator of eps alone would throw the weight out. packed.h and narrow.cpp do the
same, groups at a time.
"""

import torch
from torch import Tensor

from toolkit.kernels.rounding import hash_of

GROUP = 256  # weights that share an exponent
_SHIFT = 20  # a float32's bits without the lowest 20 of its mantissa


def num_groups(numel: int) -> int:
    """Exponents of `numel` weights."""
    return -(-numel // GROUP)


def _top_and_lowest(signed: bool) -> tuple[int, int]:
    """(largest code without sign, smallest exponent whose codes all are floats)."""
    return (127, 15) if signed else (255, 31)


def widen(codes: Tensor, exponents: Tensor, places: Tensor, *, signed: bool, first: int = 0) -> Tensor:
    """uint8 [k] codes -> float32 [k]; exact: narrowing the result to nearest gives the codes again.

    `first` is the first weight's place in the whole parameter, a group's begin.
    """
    top, _ = _top_and_lowest(signed)
    size = codes.to(torch.int32) & top
    highest = exponents.to(torch.int32)[places // GROUP - first // GROUP] << 3 | 7
    values = torch.where(size > 0, size + highest - top << _SHIFT, 0).view(torch.float32)
    return torch.where(codes > top, -values, values) if signed else values


def narrow(
    values: Tensor, places: Tensor, groups: int, *, signed: bool, seed: int | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """float32 [k] -> (codes, exponents) of `groups` groups; squared moments by chance where there is a `seed`.

    NaN and infinity stay what they are, and make the rest of their group worthless.
    """
    top, lowest = _top_and_lowest(signed)
    bits = values.contiguous().view(torch.int32)
    size = (bits & 0x7FFFFFFF).to(torch.int64)
    group = places // GROUP - first // GROUP
    noise: Tensor | int = 1 << (_SHIFT - 1)
    if seed is not None and not signed:
        rank = places % GROUP
        start = hash_of(places - rank + (seed & 0xFFFFFFFF) * 0x9E3779B9)
        noise = (start + rank * 0x9E3779B1 & 0xFFFFFFFF) >> (32 - _SHIFT)
    codes = size + noise >> _SHIFT
    exponents = torch.full((groups,), lowest, dtype=torch.int64, device=values.device)
    exponents.scatter_reduce_(0, group, codes >> 3, "amax").clamp_(max=255)  # a GPU's NaN, all bits set, has 256
    least = 0 if signed else (codes > 0).to(torch.int64)
    codes = codes - ((exponents[group] << 3 | 7) - top)
    codes = torch.maximum(codes, torch.as_tensor(least, device=values.device)).clamp_(max=top)
    if signed:
        codes |= (bits < 0).to(torch.int64) << 7
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def places_of(bits: Tensor | None, numel: int, first: int = 0, *, device: torch.device) -> Tensor:
    """int64 [k]: where the kept values of `numel` weights lie, the first of them at `first` of the whole parameter.

    `bits` bool [numel] says which are kept, None all.
    """
    flat = torch.arange(first, first + numel, device=device)
    if bits is None:
        return flat
    padded = torch.nn.functional.pad(bits, (0, -numel % GROUP)).view(-1, GROUP)
    ranks = padded.cumsum(1).sub_(1).view(-1)[:numel]
    return (flat // GROUP * GROUP + ranks)[bits]
