"""Bits, survivors and histograms in native code: what a mask update does on CPU.

Each function here equals a torch expression in toolkit.prune (mask, packing, select), which calls it where `fits` says
so, and is exact: no rounding is involved.
"""

import torch
from torch import Tensor

from toolkit.kernels.compiled import available
from toolkit.kernels.native import native_code


def fits(tensor: Tensor) -> bool:
    """Whether the native code takes this tensor: float32, uint8 or bool, on CPU, without gaps."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.uint8, torch.bool)
        and tensor.is_contiguous()
        and type(tensor) in (Tensor, torch.nn.Parameter)  # a fake or traced tensor has no memory to point at
        and available()
    )


def pack_bits(keep: Tensor) -> Tensor:
    """bool [n] -> uint8 [ceil(n / 8)]."""
    mask = torch.empty((keep.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    native_code().bits_pack_bits(keep.numel(), keep.data_ptr(), mask.data_ptr())
    return mask


def block_offsets(mask: Tensor, numel: int, block: int) -> tuple[Tensor, int]:
    """Bits of n weights -> (int32 [ceil(n / block)] survivors before each block, survivors)."""
    offsets = torch.empty(-(-numel // block), dtype=torch.int32, device="cpu")
    return offsets, native_code().bits_offsets(numel, mask.data_ptr(), block, offsets.data_ptr())


def compress(values: Tensor, mask: Tensor, survivors: int) -> Tensor:
    """float32 [n] -> float32 [survivors]."""
    out = torch.empty(survivors, dtype=torch.float32, device="cpu")  # whatever the default dtype and device
    native_code().bits_compress(values.numel(), values.data_ptr(), mask.data_ptr(), out.data_ptr())
    return out


def zero_pruned(values: Tensor, mask: Tensor) -> None:
    """Set float32 [n] to 0 in place where the bit is 0."""
    native_code().bits_zero_pruned(values.numel(), values.data_ptr(), mask.data_ptr())


def thin(mask: Tensor, numel: int, drop: Tensor) -> Tensor:
    """The bits of n weights without the survivors marked in bool [survivors]."""
    out = torch.empty_like(mask)
    native_code().bits_thin(numel, mask.data_ptr(), drop.data_ptr(), out.data_ptr())
    return out


def add_histogram(scores: Tensor, shift: int, width: int, prefix: int, counts: Tensor) -> int:
    """Count one digit of the scores' keys into int64 [2^width]; returns how many of the scores are NaN."""
    return int(native_code().bits_histogram(scores.numel(), scores.data_ptr(), shift, width, prefix, counts.data_ptr()))
