"""Dense <-> packed: values of survivors side by side, found again through the bit mask and a block-offset table.

The layout knows no update rule, so every optimizer's moments are packed by this file. n weights, k survivors:
    dense    float [n]               in memory order of the weight
    mask     uint8 [ceil(n / 8)]     1 = survivor
    packed   float [k]               the survivors' values
    offsets  int32 [ceil(n / BLOCK)] survivors before each block of BLOCK weights
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.kernels import native
from toolkit.prune.distributed import to_dtensor, to_local
from toolkit.prune.mask import flat_view, unpack_bits

# Weights a table entry covers. One int32 for 1,024 weights costs 0.0039 bytes a weight, and lets a kernel start at
# any block without counting the bits before it.
BLOCK = 1024


def offset_bytes(numel: int) -> int:
    """Bytes of the block-offset table of `numel` weights."""
    return 4 * -(-numel // BLOCK)


def block_offsets(mask: Tensor, numel: int) -> tuple[Tensor, int]:
    """Bits of `numel` weights -> (int32 [ceil(n / BLOCK)] survivors before each block, survivors in all)."""
    blocks = -(-numel // BLOCK)
    if native.fits(mask):
        offsets = torch.empty(blocks, dtype=torch.int32, device="cpu")
        return offsets, native.native_code().bits_offsets(numel, mask.data_ptr(), BLOCK, offsets.data_ptr())
    padded = torch.nn.functional.pad(unpack_bits(mask, numel), (0, blocks * BLOCK - numel))
    counts = padded.view(blocks, BLOCK).sum(1, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    return ends - counts, int(ends[-1]) if blocks else 0


def pack(dense: Tensor, mask: Tensor, survivors: int) -> Tensor:
    """Values [n] and their bits -> survivors' values [survivors], a storage of its own."""
    if native.fits(dense) and dense.dtype is torch.float32:
        packed = torch.empty(survivors, dtype=torch.float32, device="cpu")  # whatever the default dtype and device
        native.native_code().bits_compress(dense.numel(), dense.data_ptr(), mask.data_ptr(), packed.data_ptr())
        return packed
    return dense[unpack_bits(mask, dense.numel())]


def unpack(packed: Tensor, mask: Tensor, numel: int) -> Tensor:
    """Survivors' values [k] and the bits -> values [numel], 0 where pruned."""
    dense = torch.zeros(numel, dtype=packed.dtype, device=packed.device)
    dense[unpack_bits(mask, numel)] = packed
    return dense


def survivors_before(mask: Tensor | None, position: int) -> int:
    """Survivors among the first `position` weights; all of them where there is no mask."""
    return position if mask is None else block_offsets(mask, position)[1]


def pack_range(dense: Tensor, mask: Tensor | None, first: int, last: int) -> Tensor:
    """Survivors' values among the weights `first` to `last`; a view of `dense` where there is no mask."""
    values = dense[first:last]
    if mask is None:
        return values
    spare = first % 8  # a range may begin within a byte
    bits = mask[first // 8 : (last + 7) // 8]
    if spare:
        return values[unpack_bits(bits, spare + values.numel())[spare:]]
    return pack(values, bits, survivors_before(bits, values.numel()))


def dense_state(parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """State of a parameter, packed or not -> the form of checkpoints: of a DTensor too, where it has a value a weight.

    Moments of pruned weights are 0, the mask is bool, both shaped like the parameter; the offsets are left out (they
    follow from the mask). What is dense already is not copied.
    """
    part, dense = to_local(parameter), {}
    for key, value in state.items():
        if key == "offsets":
            continue
        values = None
        if key == "mask" and value.dtype is torch.uint8:  # bits
            values = unpack_bits(value, part.numel())
        elif "offsets" in state and value.ndim == 1:
            values = unpack(value, state["mask"], part.numel())
        if values is not None:
            value = torch.empty_like(part, dtype=values.dtype)
            flat_view(value).copy_(values)
        is_part = torch.is_tensor(value) and not hasattr(value, "to_local") and value.shape == part.shape
        dense[key] = to_dtensor(value, parameter) if is_part else value
    return dense
