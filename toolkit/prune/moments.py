"""A moment in an optimizer's state: floats, or 8-bit codes beside the exponents of their groups. Read and written here.

n weights of which k are kept (all while dense), as in toolkit.prune.packing and toolkit.kernels.narrow:
    key            float [k], or uint8 [k]; shaped like the weights while dense
    key_exponents  uint8 [groups]  beside codes only; ceil(n / 256) for each of the spans (toolkit.prune.spans)
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from toolkit.kernels import native
from toolkit.kernels.narrow import GROUP, narrow, places_of, widen
from toolkit.kernels.rounding import round_to_bfloat16
from toolkit.prune.mask import flat_view, pack_bits, unpack_bits
from toolkit.prune.spans import Span, Spans, num_groups_of, span_at

# Weights of a whole parameter from which on its moments are coded: whatever the sharding, the same ones are.
CODED_FROM = 4096
# Dtypes by the names that options have; uint8 are the codes.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
_SUFFIX = "_exponents"

NewPiece = tuple[Tensor, Tensor | None, int, int, int]  # values, bits, first, last, before: what `write_piece` takes


def exponents_of(key: str) -> str:
    """The state key of a moment's exponents."""
    return key + _SUFFIX


def is_exponents(key: str) -> bool:
    """Whether a state key is that of exponents, which dense forms leave out."""
    return key.endswith(_SUFFIX)


def _is_signed(key: str) -> bool:
    return not key.endswith("_sq")


def new_moment(
    state: MutableMapping[str, Tensor],
    key: str,
    like: Tensor,
    dtype: torch.dtype,
    spans: Spans,
    kept: int | None = None,
) -> None:
    """Put zeros in the state: one for each weight of `like`, laid out as they are, or [kept]; uint8 means codes."""
    state[key] = torch.zeros_like(like, dtype=dtype) if kept is None else like.new_zeros(kept, dtype=dtype)
    if dtype is torch.uint8:
        state[exponents_of(key)] = state[key].new_zeros(num_groups_of(spans))


def read_moment(state: Mapping[str, Tensor], key: str, bits: Tensor | None, numel: int, spans: Spans) -> Tensor:
    """The kept values of `numel` weights, the stored tensor itself where they are floats; shaped and laid out as it is.

    `bits` is the mask of a packed state.
    """
    stored = state[key]
    if exponents_of(key) not in state:
        return stored
    values = read_piece(state, key, bits, 0, numel, 0, stored.numel(), spans)
    if bits is None:
        shaped = torch.empty_like(stored, dtype=values.dtype)
        flat_view(shaped).copy_(values)
        return shaped
    return values


def read_piece(
    state: Mapping[str, Tensor],
    key: str,
    bits: Tensor | None,
    first: int,
    last: int,
    before: int,
    kept: int,
    spans: Spans,
) -> Tensor:
    """Of the weights `first` to `last`, whose own bits are `bits`, the `kept` values, which `before` others precede."""
    flat = flat_view(state[key])[before : before + kept]
    if exponents_of(key) not in state:
        return flat
    span = span_at(spans, first)
    if last <= span.last:
        exponents = state[exponents_of(key)][_groups_of(span, first, last)]
        return _widened(flat, exponents, bits, last - first, (first - span.first) % GROUP, _is_signed(key))
    keep, parts = None if bits is None else unpack_bits(bits, last - first), []
    for begin, end in _within_spans(first, last, spans):
        own = None if keep is None else keep[begin - first : end - first]
        count = end - begin if own is None else int(torch.count_nonzero(own))
        parts.append(read_piece(state, key, None if own is None else pack_bits(own), begin, end, before, count, spans))
        before += count
    return torch.cat(parts)


def _groups_of(span: Span, first: int, last: int) -> slice:
    """The exponents of the weights `first` to `last` of a part, which lie in this span."""
    return slice(span.group + (first - span.first) // GROUP, span.group - (span.first - last) // GROUP)


def _within_spans(first: int, last: int, spans: Spans) -> Iterator[tuple[int, int]]:
    """The weights `first` to `last`, span by span."""
    while first < last:
        end = min(last, span_at(spans, first).last)
        yield first, end
        first = end


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
    spans: Spans,
    *,
    seed: int | None = None,
) -> None:
    """Put the kept values of the weights `first` to `last`, flat, where `read_piece` finds them.

    To nearest, or with a `seed` bfloat16 and the codes of squared moments by chance, codes by an uncut parameter's.
    A piece of codes begins where a group does, and ends where one or its span does.
    """
    flat, span = flat_view(state[key])[before : before + values.numel()], span_at(spans, first)
    if exponents_of(key) not in state:
        by_chance = flat.dtype is torch.bfloat16 and seed is not None
        count = before if bits is not None else first - span.first
        flat.copy_(round_to_bfloat16(values, seed or 0, count) if by_chance else values)
        return
    assert last <= span.last
    assert not (first - span.first) % GROUP
    exponents, values = state[exponents_of(key)][_groups_of(span, first, last)], values.float()
    if native.fits(values) and seed is None:
        mask = None if bits is None else bits.data_ptr()
        native.native_code().narrow_to_nearest(
            last - first, mask, values.data_ptr(), int(_is_signed(key)), flat.data_ptr(), exponents.data_ptr()
        )
        return
    keep = None if bits is None else unpack_bits(bits, last - first)
    place = span.place // GROUP * GROUP + first - span.first  # of the group in the whole parameter
    places = places_of(keep, last - first, place, device=values.device)
    own = narrow(values, places, len(exponents), signed=_is_signed(key), seed=seed, first=place)
    flat.copy_(own[0])
    exponents.copy_(own[1])


def replace_moment(
    state: MutableMapping[str, Tensor],
    key: str,
    like: Tensor,
    dtype: torch.dtype,
    spans: Spans,
    kept: int | None,
    pieces: Iterable[NewPiece],
) -> None:
    """Keep a moment anew, as `new_moment` makes it, and filled piece by piece.

    The old one is there until the last of them is made.
    """
    made: dict[str, Tensor] = {}
    new_moment(made, key, like, dtype, spans, kept)
    for values, bits, first, last, before in pieces:
        write_piece(made, key, values, bits, first, last, before, spans)
    state.pop(exponents_of(key), None)
    state.update(made)
