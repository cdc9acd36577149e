"""A rank's part of a tensor that is cut over the ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """`values` [n] are the elements from `start` on, in row-major order, of a tensor of this shape; n may be 0.

    Each element of the tensor is in one rank's shard.
    """

    shape: torch.Size
    start: int
    values: Tensor
