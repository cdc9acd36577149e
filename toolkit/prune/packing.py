"""Dense <-> packed: values of survivors side by side, found again through the bit mask and a block-offset table.

The layout knows no update rule, so every optimizer's moments are packed by this file.
"""

import torch
from torch import Tensor

from toolkit.kernels import bits as native_bits
from toolkit.prune.mask import unpack_bits

__all__ = ["BLOCK", "block_offsets", "offset_bytes", "pack", "spread"]

# Weights a table entry covers. One int32 for 1,024 weights costs 0.0039 bytes a weight, and lets a kernel start at
# any block without counting the bits before it.
BLOCK = 1024


def offset_bytes(numel: int) -> int:
    """Bytes of the block-offset table of `numel` weights."""
    return 4 * -(-numel // BLOCK)


def block_offsets(mask: Tensor, numel: int) -> tuple[Tensor, int]:
    """Bits of `numel` weights -> (int32 [ceil(n / BLOCK)] survivors before each block, survivors in all)."""
    if native_bits.fits(mask):
        return native_bits.block_offsets(mask, numel, BLOCK)
    blocks = -(-numel // BLOCK)
    padded = torch.nn.functional.pad(unpack_bits(mask, numel), (0, blocks * BLOCK - numel))
    counts = padded.view(blocks, BLOCK).sum(1, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    return ends - counts, int(ends[-1]) if blocks else 0


def pack(dense: Tensor, mask: Tensor, survivors: int) -> Tensor:
    """Values [n] and their bits -> survivors' values [survivors], a storage of its own."""
    if native_bits.fits(dense) and dense.dtype is torch.float32:
        return native_bits.compress(dense, mask, survivors)
    return dense[unpack_bits(mask, dense.numel())]


def spread(packed: Tensor, mask: Tensor, numel: int) -> Tensor:
    """Survivors' values [k] and the bits -> values [numel], 0 where pruned."""
    dense = torch.zeros(numel, dtype=packed.dtype, device=packed.device)
    dense[unpack_bits(mask, numel)] = packed
    return dense
