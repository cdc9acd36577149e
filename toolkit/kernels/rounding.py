"""Stochastic rounding to bfloat16, from a hash instead of a generator: the same bits on every rank and device."""

import torch
from torch import Tensor


def hash_of(values: Tensor) -> Tensor:
    """int64 [n], of which the low 32 bits count -> int64 [n] of 32 bits that look random (lowbias32, Chris Wellons)."""
    low = 0xFFFFFFFF
    values = values & low
    values = values ^ (values >> 16)
    values = (values * 0x7FEB352D) & low
    values = values ^ (values >> 15)
    values = (values * 0x846CA68B) & low
    return values ^ (values >> 16)


def moment_seed(step: int, index: int) -> int:
    """Of the chances by which the first moment of parameter number `index` is rounded; the others' follow."""
    return (step * 65_537 + index) * 3


def weight_seed(seed: int) -> int:
    """Of the chances by which a parameter's weights are rounded, beside the `seed` of its first moment's."""
    return seed + 2**31  # times an odd number: half of all numbers away from the moments' of this step


def round_to_bfloat16(values: Tensor, seed: int, first: int = 0) -> Tensor:
    """float32 [n] -> bfloat16 [n], up or down with the chance that makes the mean exact.

    The chance of element i depends on (seed, first + i) alone. Plain rounding would drop the small steps of slow
    averages: bfloat16 keeps 8 bits, a second moment moves by a thousandth.
    """
    count = torch.arange(first, first + values.numel(), device=values.device, dtype=torch.int64)
    noise = hash_of(count + (seed & 0xFFFFFFFF) * 0x9E3779B9) & 0xFFFF
    bits = values.float().reshape(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = torch.where(values.reshape(-1).isfinite(), bits + noise, bits) & 0xFFFF0000
    signed = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32)
    return signed.view(torch.float32).to(torch.bfloat16).view(values.shape)
