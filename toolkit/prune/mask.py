"""The mask as bits: one bit a weight, 8 to a byte, lowest bit first, in memory order of the weight; 1 = survivor."""

from collections.abc import Iterable

import torch
from torch import Tensor

from toolkit.kernels import native
from toolkit.prune.distributed import read_numbers


def mask_bytes(numel: int) -> int:
    """Bytes of the bit mask of `numel` weights."""
    return (numel + 7) // 8


def flat_view(tensor: Tensor) -> Tensor:
    """1-D view of a dense tensor in memory order (channels_last weights are not contiguous in logical order).

    Raises ValueError for a tensor with gaps or overlaps, whose elements no 1-D view can list.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=lambda axis: (tensor.stride()[axis], tensor.shape[axis]), reverse=True)
    turned = tensor.permute(order)
    if not turned.is_contiguous():
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} and stride {tensor.stride()} has gaps; make it contiguous"
        )
    return turned.view(-1)


def _places(device: torch.device) -> Tensor:
    """Of the bits in a byte; made on the device, for a copy from the host would wait for it."""
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack_bits(keep: Tensor) -> Tensor:
    """bool [n] -> uint8 [ceil(n / 8)]; spare bits of the last byte are 0."""
    if native.fits(keep):
        mask = torch.empty(mask_bytes(keep.numel()), dtype=torch.uint8, device="cpu")
        native.native_code().bits_pack_bits(keep.numel(), keep.data_ptr(), mask.data_ptr())
        return mask
    bits, spare = keep.view(torch.uint8), -keep.numel() % 8
    if spare:
        bits = torch.nn.functional.pad(bits, (0, spare))
    return (bits.view(-1, 8) << _places(keep.device)).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, numel: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    return (mask.unsqueeze(1) >> _places(mask.device)).bitwise_and_(1).view(torch.bool).view(-1)[:numel]


def drop_survivors(mask: Tensor, numel: int, drop: Tensor) -> Tensor:
    """The bits of `numel` weights without the survivors marked in `drop`, bool [survivors]."""
    if native.fits(mask) and native.fits(drop):
        left = torch.empty_like(mask)
        native.native_code().bits_thin(numel, mask.data_ptr(), drop.data_ptr(), left.data_ptr())
        return left
    keep = unpack_bits(mask, numel)
    return pack_bits(keep.masked_scatter(keep, ~drop))


def count_zeros(parts: Iterable[Tensor]) -> int:
    """Zeros in all parts together; one wait a device."""
    held = list(parts)
    return sum(map(Tensor.numel, held)) - sum(read_numbers([torch.count_nonzero(part) for part in held]))


def zero_pruned(values: Tensor, mask: Tensor) -> None:
    """Set values [n] to 0 in place where the bit is 0."""
    if native.fits(values) and values.dtype is torch.float32:
        native.native_code().bits_zero_pruned(values.numel(), values.data_ptr(), mask.data_ptr())
    else:
        values.masked_fill_(~unpack_bits(mask, values.numel()), 0.0)
