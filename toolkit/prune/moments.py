"""A moment in an optimizer's state: floats, or 8-bit codes beside the exponents of their groups. Read and written here.

n weights of which k are kept (all while dense), as in toolkit.prune.packing and toolkit.kernels.narrow:
    key            float [k], or uint8 [k]; shaped like the weights while dense
    key_exponents  uint8 [ceil(n / 256)]  beside codes only
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from toolkit.kernels import native
from toolkit.kernels.narrow import GROUP, narrow, num_groups, places_of, widen
from toolkit.kernels.rounding import round_to_bfloat16
from toolkit.prune.mask import flat_view, unpack_bits

# Weights of a whole parameter from which on its moments are coded: whatever the sharding, the same ones are.
CODED_FROM = 4096
# Dtypes by the names that options have; uint8 are the codes.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
_SUFFIX = "_exponents"


def exponents_of(key: str) -> str:
    """The state key of a moment's exponents."""
    return key + _SUFFIX


def exponent_bytes(numel: int) -> int:
    """Bytes of the exponents of a coded moment of `numel` weights."""
    return num_groups(numel)


def is_exponents(key: str) -> bool:
    """Whether a state key is that of exponents, which dense forms leave out."""
    return key.endswith(_SUFFIX)


def grid(first: int) -> int:
    """Where a shard's first group begins in the whole parameter; of a shard cut within a group, the one it is cut in.

    Its groups then are its own, and differ from those of the uncut parameter.
    """
    return first // GROUP * GROUP


def _is_signed(key: str) -> bool:
    return not key.endswith("_sq")


def new_moment(state: MutableMapping[str, Tensor], key: str, like: Tensor, dtype: torch.dtype, numel: int) -> None:
    """Put zeros in the state: of `numel` weights those kept, shaped and laid out as `like` is; uint8 means codes."""
    state[key] = torch.zeros_like(like, dtype=dtype)
    if dtype is torch.uint8:
        state[exponents_of(key)] = state[key].new_zeros(num_groups(numel))


def read_moment(state: Mapping[str, Tensor], key: str, bits: Tensor | None, numel: int) -> Tensor:
    """The kept values of `numel` weights, the stored tensor itself where they are floats; shaped and laid out as it is.

    `bits` is the mask of a packed state.
    """
    stored = state[key]
    if exponents_of(key) not in state:
        return stored
    values = _widened(flat_view(stored), state[exponents_of(key)], bits, numel, 0, _is_signed(key))
    if bits is None:
        shaped = torch.empty_like(stored, dtype=values.dtype)
        flat_view(shaped).copy_(values)
        return shaped
    return values


def read_piece(
    state: Mapping[str, Tensor], key: str, bits: Tensor | None, first: int, last: int, before: int, kept: int
) -> Tensor:
    """Of the weights `first` to `last`, whose own bits are `bits`, the `kept` values, which `before` others precede."""
    flat = flat_view(state[key])[before : before + kept]
    if exponents_of(key) not in state:
        return flat
    exponents = state[exponents_of(key)][first // GROUP : -(-last // GROUP)]
    return _widened(flat, exponents, bits, last - first, first % GROUP, _is_signed(key))


def _widened(codes: Tensor, exponents: Tensor, bits: Tensor | None, numel: int, first: int, signed: bool) -> Tensor:
    """`first` is the place within its group of the first weight."""
    if native.fits(codes) and not first:
        values = torch.empty(codes.numel(), dtype=torch.float32, device="cpu")
        mask = None if bits is None else bits.data_ptr()
        native.native_code().narrow_widen(
            numel, mask, codes.data_ptr(), exponents.data_ptr(), int(signed), values.data_ptr()
        )
        return values
    keep = None if bits is None else unpack_bits(bits, numel)
    return widen(codes, exponents, places_of(keep, numel, first, device=codes.device), signed=signed)


def write_moment(
    state: MutableMapping[str, Tensor],
    key: str,
    values: Tensor,
    bits: Tensor | None,
    numel: int,
    *,
    seed: int | None = None,
    first: int = 0,
) -> None:
    """Put the kept values of `numel` weights, flat, in the place and the format of those that are there.

    To nearest, or with a `seed` bfloat16 and the codes of squared moments by chance; `bits` as in `read_moment`.
    `first` is where the first group begins in the whole parameter (see `grid`): the chances are those of an uncut one.
    """
    there = state[key]
    if exponents_of(key) not in state:
        by_chance = there.dtype is torch.bfloat16 and seed is not None
        codes = round_to_bfloat16(values, seed or 0) if by_chance else values.to(there.dtype)
    elif native.fits(values := values.float()) and seed is None:
        codes = torch.empty(values.numel(), dtype=torch.uint8, device="cpu")
        exponents = torch.empty(num_groups(numel), dtype=torch.uint8, device="cpu")
        mask = None if bits is None else bits.data_ptr()
        native.native_code().narrow_to_nearest(
            numel, mask, values.data_ptr(), int(_is_signed(key)), codes.data_ptr(), exponents.data_ptr()
        )
        state[exponents_of(key)] = exponents
    else:
        keep = None if bits is None else unpack_bits(bits, numel)
        places, signed = places_of(keep, numel, first, device=values.device), _is_signed(key)
        codes, state[exponents_of(key)] = narrow(
            values, places, num_groups(numel), signed=signed, seed=seed, first=first
        )
    # In place, but for values that are no longer a weight each: those lie flat.
    if codes.numel() == there.numel() and (bits is None or there.ndim == 1):
        flat_view(there).copy_(codes)
    else:
        state[key] = codes


def recode_moment(
    state: MutableMapping[str, Tensor], key: str, bits: Tensor | None, numel: int, dtype: torch.dtype
) -> None:
    """Keep a moment in another precision: exactly where that is wider, to nearest where it is narrower."""
    there = state[key]
    if there.dtype is dtype:
        return
    values = flat_view(read_moment(state, key, bits, numel))
    state.pop(exponents_of(key), None)
    new_moment(state, key, there, dtype, numel)
    write_moment(state, key, values, bits, numel)
