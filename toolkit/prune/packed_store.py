"""What an optimizer that prunes by state keeps for its prunable weights: survivors' moments, in pieces."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.prune.distributed import in_layout_of, local_gradient
from toolkit.prune.mask import drop_survivors, flat_view, pack_bits, unpack_bits, zero_pruned
from toolkit.prune.moments import CODED_FROM, STATE_DTYPES, NewPiece, replace_moment
from toolkit.prune.packing import Packer, pack, range_bits, span_offsets, survivors_before, unpack
from toolkit.prune.stores import MaskedStore, Member, Piece, in_blocks


class PackedStore(MaskedStore):
    """Weights, and moments in the state (`keys`) that are kept for survivors only.

    Moments are made anew a piece at a time, and one after the other: beside what is kept there is never more than one
    of a tensor, a byte or two a weight of marks, and a piece's values.
    """

    def settle(self, members: Sequence[Member], survivors: int) -> None:
        """Widen the moments as far as the budget allows now: after all weights have gone, a tensor at a time."""
        self.fit(survivors)
        if self.budget is None or self.precision is None:
            return
        dtype = STATE_DTYPES[self.precision]
        for member in members:
            if member.parameter.numel() >= CODED_FROM:
                for key in self._kept_keys(member):
                    if member.state[key].dtype is not dtype:
                        _recode(member, key, dtype)

    def apply(self, member: Member, drop: Tensor, grow: Tensor | None) -> None:
        """Pack the moments again; weights that go become 0, weights that come back start at 0. `drop` is used up."""
        part, state, n = member.part, member.state, member.part.numel()
        # 1. The masks: `mask` of what stays, `after` with what comes back.
        old = in_blocks(member, state.get("offsets"), drop.numel())
        mask = None if member.mask is None else drop_survivors(state["mask"], n, drop)
        stay = drop.logical_not_()
        after = mask = pack_bits(stay) if mask is None else mask
        offsets, left = span_offsets(mask, member.spans)
        new = staying = in_blocks(member, offsets, left)
        if grow is not None and member.mask is not None:
            after = _with_regrown(mask, old, grow)
            offsets, left = span_offsets(after, member.spans)
            new = in_blocks(member, offsets, left)

        # 2. The moments: what the packer needs is made once for all of them where the part is one piece.
        @functools.lru_cache(maxsize=1)
        def packer(number: int) -> Packer:
            own = stay[old[number].before : old[number].before + old[number].kept]
            return Packer(staying[number].kept, keep=own)

        def repacked(key: str, number: int) -> NewPiece:
            one, packed = new[number], "offsets" in state
            kept, bits = packer(number)(old[number].moment(key, packed)), range_bits(after, one.first, one.last)
            if after is not mask:
                kept = _let_in(kept, key, old[number], range_bits(mask, one.first, one.last), one.kept, bits)
            return kept, bits, one.first, one.last, one.before

        for key in self._kept_keys(member):
            pieces = map(functools.partial(repacked, key), range(len(new)))
            replace_moment(state, key, part, state[key].dtype, member.spans, left, pieces)
        state["mask"], state["offsets"] = after, offsets
        zero_pruned(flat_view(part), after)

    def load(self, member: Member, key: str, dense: Tensor, dtype: torch.dtype) -> None:
        """Keep a moment under the member's mask that comes with a value a weight, from whatever device."""
        state, part = member.state, member.part
        flat, packed = flat_view(in_layout_of(part, dense)), "offsets" in state  # whatever the order it was saved in
        kept = survivors_before(state["mask"] if packed else None, part.numel())

        def piece(one: Piece) -> NewPiece:
            values = one.of(flat).to(part.device)
            bits = one.mask if packed else None
            return values if bits is None else pack(values, bits, one.kept), bits, one.first, one.last, one.before

        pieces = map(piece, in_blocks(member, state.get("offsets"), kept))
        replace_moment(state, key, part, dtype, member.spans, kept if packed else None, pieces)

    def _kept_keys(self, member: Member) -> list[str]:
        return [key for key in self._keys if key in member.state]


def _recode(member: Member, key: str, dtype: torch.dtype) -> None:
    """Keep a moment in another precision: exactly where that is wider, to nearest where it is narrower."""
    state, packed = member.state, "offsets" in member.state
    kept = state[key].numel()
    pieces = in_blocks(member, state.get("offsets"), kept)
    made = ((one.moment(key, packed), one.mask if packed else None, one.first, one.last, one.before) for one in pieces)
    replace_moment(state, key, member.part, dtype, member.spans, kept if packed else None, made)


def _with_regrown(mask: Tensor, old: Sequence[Piece], grow: Tensor) -> Tensor:
    """The bits of `mask`, and of the weights marked in `grow`, bool [pruned], which the pieces' own masks lack."""
    after = torch.empty_like(mask)
    for piece in old:
        gone, before = ~_marks(piece), piece.first - piece.before
        gone.masked_scatter_(gone.clone(), grow[before : before + len(gone) - piece.kept])
        place = slice(piece.first // 8, (piece.last + 7) // 8)
        torch.bitwise_or(mask[place], pack_bits(gone), out=after[place])
    return after


def _let_in(kept: Tensor, key: str, old: Piece, mask: Tensor, count: int, after: Tensor) -> Tensor:
    """The values kept under `mask` and those that begin -> the `count` values kept under `after`.

    Momentum begins at 0, second moments at the gradient's square: with v = 0 the first step would be 3 times a settled
    one, (1 - beta1) / sqrt(1 - beta2); so it is a tenth.
    """
    n = old.last - old.first
    dense = unpack(kept, mask, n)
    if key.endswith("_sq"):
        came = unpack_bits(after, n) & ~_marks(old)
        grad = old.of(local_gradient(old.member.parameter, old.member.part))
        dense = torch.where(came, grad.square().to(dense.dtype), dense)
    return Packer(count, bits=after)(dense)


def _marks(piece: Piece) -> Tensor:
    """bool [n]: which of a masked piece's weights survive."""
    assert piece.mask is not None
    return unpack_bits(piece.mask, piece.last - piece.first)
