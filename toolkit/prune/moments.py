"""A moment in an optimizer's state: floats, or 8-bit codes beside the exponents of their groups. Read and written here.

n weights of which k are kept (all while dense), as in toolkit.prune.packing and toolkit.kernels.narrow:
    key            float [k], or uint8 [k]; shaped like the weights while dense
    key_exponents  uint8 [ceil(n / 256)]  beside codes only
"""

from collections.abc import Iterable, Mapping, MutableMapping

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

NewPiece = tuple[Tensor, Tensor | None, int, int, int]  # values, bits, first, last, before: what `write_piece` takes


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


def new_moment(
    state: MutableMapping[str, Tensor], key: str, like: Tensor, dtype: torch.dtype, kept: int | None = None
) -> None:
    """Put zeros in the state: one for each weight of `like`, laid out as they are, or [kept]; uint8 means codes."""
    state[key] = torch.zeros_like(like, dtype=dtype) if kept is None else like.new_zeros(kept, dtype=dtype)
    if dtype is torch.uint8:
        state[exponents_of(key)] = state[key].new_zeros(num_groups(like.numel()))


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


def write_piece(
    state: MutableMapping[str, Tensor],
    key: str,
    values: Tensor,
    bits: Tensor | None,
    first: int,
    last: int,
    before: int,
    *,
    seed: int | None = None,
    origin: int = 0,
) -> None:
    """Put the kept values of the weights `first` to `last`, flat, where `read_piece` finds them.

    To nearest, or with a `seed` bfloat16 and the codes of squared moments by chance. A piece of codes begins where a
    group does, and ends where one does or with the weights. `origin` is where the weights' first group begins in the
    whole parameter (see `grid`): the chances are those of an uncut one.
    """
    flat = flat_view(state[key])[before : before + values.numel()]
    if exponents_of(key) not in state:
        by_chance = flat.dtype is torch.bfloat16 and seed is not None
        flat.copy_(round_to_bfloat16(values, seed or 0, before) if by_chance else values)
        return
    exponents, values = state[exponents_of(key)][first // GROUP : -(-last // GROUP)], values.float()
    if native.fits(values) and seed is None:
        mask = None if bits is None else bits.data_ptr()
        native.native_code().narrow_to_nearest(
            last - first, mask, values.data_ptr(), int(_is_signed(key)), flat.data_ptr(), exponents.data_ptr()
        )
        return
    keep, origin = None if bits is None else unpack_bits(bits, last - first), origin + first
    places = places_of(keep, last - first, origin, device=values.device)
    own = narrow(values, places, len(exponents), signed=_is_signed(key), seed=seed, first=origin)
    flat.copy_(own[0])
    exponents.copy_(own[1])


def replace_moment(
    state: MutableMapping[str, Tensor],
    key: str,
    like: Tensor,
    dtype: torch.dtype,
    kept: int | None,
    pieces: Iterable[NewPiece],
) -> None:
    """Keep a moment anew, as `new_moment` makes it, and filled piece by piece.

    The old one is there until the last of them is made.
    """
    made: dict[str, Tensor] = {}
    new_moment(made, key, like, dtype, kept)
    for values, bits, first, last, before in pieces:
        write_piece(made, key, values, bits, first, last, before)
    state.pop(exponents_of(key), None)
    state.update(made)
