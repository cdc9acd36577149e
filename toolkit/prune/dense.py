"""A parameter's optimizer state in its dense form: every value shaped like the parameter, masks as bool."""

from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.prune.mask import MASK_KEYS, flat, unpack_bits
from toolkit.prune.packing import spread

__all__ = ["dense_state"]


def dense_state(part: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a parameter (this rank's part of it), packed or not -> the form of checkpoints.

    Moments of pruned weights are 0, `mask` and `keep` are bool, the offsets are left out (they follow from the mask).
    What is dense already is not copied.
    """
    dense = {}
    for key, value in state.items():
        if key == "offsets":
            continue
        values = None
        if key in MASK_KEYS and value.dtype is torch.uint8:  # bits
            values = unpack_bits(value, part.numel())
        elif "offsets" in state and value.ndim == 1:
            values = spread(value, state["mask"], part.numel())
        if values is not None:
            value = torch.empty_like(part, dtype=values.dtype)
            flat(value).copy_(values)
        dense[key] = value
    return dense
