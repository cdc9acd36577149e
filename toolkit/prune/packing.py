"""Dense <-> packed: values of survivors side by side, found again through the bit mask and a block-offset table.

The layout knows no update rule, so every optimizer's moments are packed by this file. n weights, k survivors:
    dense    float [n]               in memory order of the weight
    mask     uint8 [ceil(n / 8)]     1 = survivor
    packed   float [k]               the survivors' values
    offsets  int32 [blocks]          survivors before each block; ceil(n / BLOCK) for each of the spans
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.kernels import native
from toolkit.prune.distributed import to_dtensor, to_local
from toolkit.prune.mask import mask_bytes, pack_bits, unpack_bits
from toolkit.prune.moments import exponents_of, is_exponents, read_moment
from toolkit.prune.spans import BLOCK, Ranges, Span, Spans, make_spans, whole_range


def offset_bytes(numel: int) -> int:
    """Bytes of the block-offset table of `numel` weights."""
    return 4 * -(-numel // BLOCK)


def span_offsets(mask: Tensor, spans: Spans) -> tuple[Tensor, int]:
    """Bits of a part -> (int32 [blocks] survivors before each block of its spans, survivors in all).

    On a GPU it waits once.
    """
    own = [mask[span.first // 8 : mask_bytes(span.last)] for span in spans]
    if native.fits(mask):
        made, before = [], 0
        for span, bits in zip(spans, own, strict=True):
            offsets = torch.empty(span.blocks, dtype=torch.int32, device="cpu")
            count = native.native_code().bits_offsets(span.numel, bits.data_ptr(), BLOCK, offsets.data_ptr())
            made.append(offsets.add_(before))
            before += count
        return made[0] if len(made) == 1 else torch.cat(made), before
    counts = torch.cat([_block_counts(bits, span) for span, bits in zip(spans, own, strict=True)])
    ends = counts.cumsum(0, dtype=torch.int32)
    return ends - counts, int(ends[-1]) if len(ends) else 0


def _block_counts(bits: Tensor, span: Span) -> Tensor:
    """Survivors in each block of a span: int32 [blocks]."""
    keep = torch.nn.functional.pad(unpack_bits(bits, span.numel), (0, span.blocks * BLOCK - span.numel))
    return keep.view(-1, BLOCK).sum(1, dtype=torch.int32)


def count_survivors(mask: Tensor, first: int, last: int) -> Tensor:
    """Survivors among the weights `first` to `last`: int64 [], on the mask's device, so that nothing waits for it."""
    begin = first // 8 * 8  # a range may begin within a byte
    bits = mask[begin // 8 : (last + 7) // 8]
    if native.fits(bits):
        offsets = torch.empty(2, dtype=torch.int32, device="cpu")  # of blocks that are longer than any tensor
        before, all_of_it = (
            native.native_code().bits_offsets(place - begin, bits.data_ptr(), 2**62, offsets.data_ptr())
            for place in (first, last)
        )
        return torch.tensor(all_of_it - before, dtype=torch.int64, device="cpu")
    return torch.count_nonzero(unpack_bits(bits, last - begin)[first - begin :])


def survivors_before(mask: Tensor | None, position: int) -> int:
    """Survivors among the first `position` weights; all of them where there is no mask. On a GPU it waits."""
    return position if mask is None else int(count_survivors(mask, 0, position))


class Packer:
    """Packs values by one mask, given as `bits` or as marks `keep`, bool [n], of which `survivors` are set.

    What a call needs beside the values is made once, and since the number is known nothing waits for a GPU.
    """

    def __init__(self, survivors: int, *, bits: Tensor | None = None, keep: Tensor | None = None) -> None:
        self._survivors, self._bits, self._keep = survivors, bits, keep
        self._places: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Values [n] -> those of the survivors [survivors], a storage of its own."""
        if native.fits(values) and values.dtype is torch.float32:
            if self._bits is None:
                assert self._keep is not None
                self._bits = pack_bits(self._keep)
            packed = torch.empty(self._survivors, dtype=torch.float32, device="cpu")  # whatever the defaults are
            bits = self._bits.data_ptr()
            native.native_code().bits_compress(values.numel(), values.data_ptr(), bits, packed.data_ptr())
            return packed
        if self._places is None:
            if self._keep is None:
                assert self._bits is not None
                self._keep = unpack_bits(self._bits, values.numel())
            self._places = torch.nonzero_static(self._keep, size=self._survivors).view(-1)
        return values[self._places]


def pack(dense: Tensor, mask: Tensor, survivors: int) -> Tensor:
    """Values [n] and their bits -> survivors' values [survivors], a storage of its own."""
    return Packer(survivors, bits=mask)(dense)


def unpack(packed: Tensor, mask: Tensor, numel: int) -> Tensor:
    """Survivors' values [k] and the bits -> values [numel], 0 where pruned."""
    dense = torch.zeros(numel, dtype=packed.dtype, device=packed.device)
    return dense.masked_scatter_(unpack_bits(mask, numel), packed)


def range_bits(mask: Tensor, first: int, last: int) -> Tensor:
    """The bits of the weights `first` to `last` as a mask of their own; what is behind the last one is anything."""
    begin = first // 8 * 8
    bits = mask[begin // 8 : (last + 7) // 8]
    return bits if first == begin else pack_bits(unpack_bits(bits, last - begin)[first - begin :])


def join_bits(masks: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The bits of several ranges, each of whole bytes, one behind the other; spare bits are 0."""
    whole = [bits if not n % 8 else pack_bits(unpack_bits(bits, n)) for bits, n in zip(masks, sizes, strict=True)]
    return torch.cat(whole)


def join_values(values: Sequence[Tensor]) -> Tensor:
    """The values of several ranges side by side as `join_bits` puts their bits: with room for the spare bits."""
    parts = []
    for one in values:
        parts += [one, one.new_zeros(-one.numel() % 8)] if one.numel() % 8 else [one]
    return torch.cat(parts)


def dense_state(parameter: Tensor, state: Mapping[str, Any], ranges: Ranges | None = None) -> dict[str, Any]:
    """State of a parameter, packed or not -> the form of checkpoints: of a DTensor too, where it has a value a weight.

    Moments of pruned weights are 0, the mask is bool, both shaped like the parameter; the offsets are left out (they
    follow from the mask). What is dense already is not copied; what is made is made on the host, so that a GPU that
    the state fits needs no room for its dense form (a DTensor's part goes back to its device). `ranges` says what a
    flat slice is made of.
    """
    part, dense = to_local(parameter), {}
    spans = make_spans(part.numel(), whole_range(parameter) if ranges is None else ranges)
    bits = state["mask"].cpu() if "offsets" in state else None
    for key, value in state.items():
        if key == "offsets" or is_exponents(key):
            continue
        values = None
        if exponents_of(key) in state:
            coded = {one: state[one].cpu() for one in (key, exponents_of(key))}
            value = read_moment(coded, key, bits, part.numel(), spans)
        if key == "mask" and value.dtype is torch.uint8:  # bits
            values = unpack_bits(value.cpu(), part.numel())
        elif bits is not None and value.ndim == 1:
            values = unpack(value.cpu(), bits, part.numel())
        if values is not None:
            value = values.as_strided(part.shape, part.stride())  # in memory order as they are
        is_part = torch.is_tensor(value) and not hasattr(value, "to_local") and value.shape == part.shape
        dense[key] = to_dtensor(value, parameter) if is_part else value
    return dense
