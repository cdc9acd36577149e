"""Dense <-> packed: values of survivors side by side, found again through the bit mask and a block-offset table.

The layout knows no update rule, so every optimizer's moments are packed by this file.
"""

import torch
from torch import Tensor

__all__ = ["BLOCK", "block_offsets", "offset_bytes", "pack", "spread"]

# Weights a table entry covers. One int32 for 1,024 weights costs 0.0039 bytes a weight, and lets a kernel start at
# any block without counting the bits before it.
BLOCK = 1024


def offset_bytes(numel: int) -> int:
    """Bytes of the block-offset table of `numel` weights."""
    return 4 * -(-numel // BLOCK)


def block_offsets(keep: Tensor) -> Tensor:
    """bool [n] -> int32 [ceil(n / BLOCK)]: survivors in all blocks before each block."""
    blocks = -(-keep.numel() // BLOCK)
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, blocks * BLOCK - keep.numel()))
    counts = padded.view(blocks, BLOCK).sum(1, dtype=torch.int32)
    return counts.cumsum(0, dtype=torch.int32) - counts


def pack(dense: Tensor, keep: Tensor) -> Tensor:
    """Values [n] -> survivors' values [k], a storage of its own."""
    return dense[keep]


def spread(packed: Tensor, keep: Tensor) -> Tensor:
    """Survivors' values [k] -> values [n], 0 where pruned."""
    dense = torch.zeros(keep.numel(), dtype=packed.dtype, device=packed.device)
    dense[keep] = packed
    return dense
