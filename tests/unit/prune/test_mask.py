import unittest.mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import block_offsets

from toolkit.kernels import native as native_code
from toolkit.prune.mask import drop_survivors, flat_view, mask_bytes, pack_bits, unpack_bits, zero_pruned
from toolkit.prune.packing import BLOCK, offset_bytes, pack, unpack

keeps = st.one_of(
    st.lists(st.booleans(), max_size=70), st.integers(0, 5000).map(lambda n: [i % 3 == 0 for i in range(n)])
)


@given(keeps)
def test_bits_round_trip(keep):
    keep = torch.tensor(keep, dtype=torch.bool)
    mask = pack_bits(keep)
    assert mask.dtype == torch.uint8
    assert mask.nbytes == mask_bytes(len(keep))
    assert torch.equal(unpack_bits(mask, len(keep)), keep)


def test_lowest_bit_comes_first():
    assert pack_bits(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


@given(keeps)
def test_offsets_count_survivors_before_each_block(keep):
    keep = torch.tensor(keep, dtype=torch.bool)
    offsets, survivors = block_offsets(pack_bits(keep), len(keep))
    assert offsets.dtype == torch.int32
    assert offsets.nbytes == offset_bytes(len(keep))
    assert offsets.tolist() == [int(keep[: i * BLOCK].sum()) for i in range(len(offsets))]
    assert survivors == int(keep.sum())


@given(keeps, st.integers(0, 2**32))
def test_spread_undoes_pack(keep, seed):
    keep = torch.tensor(keep, dtype=torch.bool)
    dense = torch.randn(len(keep), generator=torch.Generator().manual_seed(seed))
    packed = pack(dense, pack_bits(keep), int(keep.sum()))
    assert packed.untyped_storage().nbytes() == 4 * int(keep.sum())  # a storage of its own, no larger than needed
    assert torch.equal(packed, dense[keep])
    assert torch.equal(unpack(packed, pack_bits(keep), len(keep)), dense * keep)


@given(keeps, st.integers(0, 2**32))
def test_thin_and_zero_pruned(keep, seed):
    keep = torch.tensor(keep, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    drop = torch.rand(int(keep.sum()), generator=generator) < 0.4
    wanted = keep.clone()
    wanted[keep] = ~drop
    mask = drop_survivors(pack_bits(keep), len(keep), drop)
    assert torch.equal(mask, pack_bits(wanted))
    values = torch.randn(len(keep), generator=generator)
    zeroed = values.clone()
    zero_pruned(zeroed, mask)
    assert torch.equal(zeroed, torch.where(wanted, values, 0.0))


@given(keeps, st.integers(0, 2**32))
def test_native_code_equals_torch(keep, seed):
    keep = torch.tensor(keep, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    drop = torch.rand(int(keep.sum()), generator=generator) < 0.4
    values = torch.randn(len(keep), generator=generator)

    def everything():
        mask = pack_bits(keep)
        zeroed = values.clone()
        zero_pruned(zeroed, mask)
        offsets, survivors = block_offsets(mask, len(keep))
        return [mask, drop_survivors(mask, len(keep), drop), zeroed, offsets, pack(values, mask, survivors)]

    native = everything()
    with unittest.mock.patch.object(native_code, "fits", return_value=False):
        plain = everything()
    for mine, wanted in zip(native, plain, strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


def test_flat_is_a_view_in_memory_order():
    weight = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    line = flat_view(weight)
    assert line.data_ptr() == weight.data_ptr()
    assert torch.equal(line, weight.permute(0, 2, 3, 1).reshape(-1))
    line[0] = -1.0
    assert weight[0, 0, 0, 0] == -1.0


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (4, 3, 1, 1), (1, 3, 2, 2), (5, 1, 1, 1)])
def test_flat_of_odd_channels_last_shapes(shape):
    weight = torch.randn(shape).to(memory_format=torch.channels_last)
    other = torch.empty_like(weight)
    flat_view(other).copy_(flat_view(weight))
    assert torch.equal(other, weight)


def test_flat_refuses_gaps():
    with pytest.raises(ValueError, match="has gaps"):
        flat_view(torch.zeros(4, 6)[:, ::2])
