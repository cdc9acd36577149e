"""Weights and moments as a Triton kernel reads and keeps them: float32, bfloat16, or 8-bit codes (kernels.narrow).

A block is [ROWS, WARPS, 32] as in triton_kernels, all of it computed with in float32. Where its moments are:
    start   the tensor's first moment of the block
    at      [ROWS, WARPS, 32]  each weight's place behind it
    alive   [ROWS, WARPS, 32]  which weights have one
    begin   [1, WARPS, 1]      the place of each warp's first
    group   [1, WARPS, 32]     of 8-bit codes, whose group is a warp's 256 weights: its number in the tensor
    exists  [1, WARPS, 32]     whether the tensor reaches as far
    near    [ROWS, WARPS, 32]  of dense ones: `at`, but the last one where the tensor has ended
"""

# Kernels take what Triton gives them: pointers, blocks and compile-time constants have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202, SIM300
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl


@triton.jit
def _hash(values):
    """As toolkit.kernels.rounding: uint32 -> uint32 (lowbias32)."""
    values = values ^ (values >> 16)
    values = values * 0x7FEB352D
    values = values ^ (values >> 15)
    values = values * 0x846CA68B
    return values ^ (values >> 16)


@triton.jit
def addresses(pointer, at):
    """Of a block's elements. The hint only ranks the axes, so that lanes get the last and warps the middle one.

    Without it the version decides, and 3.6 moves every block through shared memory. It cannot widen an access: nothing
    is known of the alignment of an address that was read from memory.
    """
    return tl.max_contiguous(pointer + at, [1, 2, 4])


@triton.jit
def load(pointer, at, mask=None):
    """Read as float32; without a mask where the place is one kept inside (`near`).

    NVIDIA has seven predicates: with one a row the assembler waits for some loads before it asks for the next. Stores
    use the other place, or the addresses stay in registers. 8-bit Adam, dense: 108 with masks, 124 by one place, 71 so.
    """
    return tl.load(addresses(pointer, at), mask=mask).to(tl.float32)


@triton.jit
def _store_bfloat16(pointer, at, values, mask, noise):
    """Store float32 as bfloat16: the upper bits after `noise`, below 2^16, was added."""
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = (bits + tl.where(finite, noise, 0)) >> 16
    tl.store(addresses(pointer, at), upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)


@triton.jit
def store(pointer, at, values, mask, TYPE: tl.constexpr) -> None:
    """Store rounded to the nearest, ties to even, as torch's copy does."""
    if TYPE == tl.float32:
        tl.store(addresses(pointer, at), values, mask=mask)
    else:  # with bits, because Triton's interpreter cuts off
        odd = (values.to(tl.uint32, bitcast=True) >> 16) & 1
        _store_bfloat16(pointer, at, values, mask, odd + 0x7FFF)


@triton.jit
def store_weight(weights, position, new, inside, row, start, step, WEIGHT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Store a block's weights, bfloat16 ones by chance where STOCHASTIC: to the bit as the reference."""
    if WEIGHT == tl.float32 or not STOCHASTIC:
        store(weights, position, new, inside, WEIGHT)
    else:
        first = (tl.load(row + 12) + start).to(tl.uint32) + chance(row, step, WEIGHT) + 0x80000000
        _store_bfloat16(weights, position, new, inside, _hash(position.to(tl.uint32) + first) & 0xFFFF)


@triton.jit
def chance(row, step, TYPE: tl.constexpr):
    """Where the chances of a step begin by which what is of this type is rounded: the reference's, to the same bits."""
    start = (step.to(tl.uint32) * 65537 + tl.load(row + 8).to(tl.uint32)) * 3 * 0x9E3779B9
    if TYPE == tl.uint8:
        start += (tl.load(row + 12) // 256 * 256).to(tl.uint32)
    return start


@triton.jit
def moment(row, slots, NUMBER: tl.constexpr, STATE: tl.constexpr):
    """Addresses of a block's values and of its groups' exponents, where it has any."""
    start, _, _, _, group, _, _ = slots
    values = tl.load(row + 5 + NUMBER).to(tl.pointer_type(STATE)) + start
    exponents = values
    if STATE == tl.uint8:
        exponents = addresses(tl.load(row + 9 + NUMBER).to(tl.pointer_type(tl.uint8)), group)
    return values, exponents


@triton.jit
def load_moment(moment, slots, SIGNED: tl.constexpr, STATE: tl.constexpr, DENSE: tl.constexpr):
    """Read as float32."""
    values, exponents = moment
    _, at, alive, _, _, exists, near = slots
    if DENSE:
        kept = tl.load(addresses(values, near))
    else:
        kept = tl.load(addresses(values, at), mask=alive)
    if STATE == tl.uint8:
        top: tl.constexpr = 127 if SIGNED else 255
        codes, shared = kept.to(tl.uint32), tl.load(exponents, mask=exists).to(tl.uint32)
        size = codes & top
        bits = tl.where(size > 0, (size + (shared << 3 | 7) - top) << 20, 0)
        if SIGNED:
            bits |= (codes & 128) << 24
        return bits.to(tl.float32, bitcast=True)
    else:
        return kept.to(tl.float32)


@triton.jit
def store_moment(
    moment,
    slots,
    new,
    seed,
    NUMBER: tl.constexpr,
    SIGNED: tl.constexpr,
    STATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """Store what is `new`; `seed` as `chance` gives it."""
    values, _ = moment
    start, at, alive, _, _, _, _ = slots
    seed += NUMBER * 0x9E3779B9 & 0xFFFFFFFF
    if STATE == tl.uint8:
        _store_codes(moment, slots, new, seed, SIGNED, STOCHASTIC)
    elif STATE == tl.float32 or not STOCHASTIC:
        store(values, at, new, alive, STATE)
    else:
        noise = _hash(at.to(tl.uint32) + (start.to(tl.uint32) + seed)) & 0xFFFF
        _store_bfloat16(values, at, new, alive, noise)


@triton.jit
def _store_codes(moment, slots, new, seed, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Store as 8-bit codes and exponents: to the bit those of toolkit.kernels.narrow."""
    values, exponents = moment
    _, at, alive, begin, group, exists, _ = slots
    top: tl.constexpr = 127 if SIGNED else 255
    lowest: tl.constexpr = 15 if SIGNED else 31
    # 1. Rounded.
    bits = new.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if STOCHASTIC and not SIGNED:
        noise = (_hash(seed + (group * 256).to(tl.uint32)) + (at - begin).to(tl.uint32) * 0x9E3779B1) >> 12
        rounded = ((size + noise) >> 20).to(tl.int32)
    else:
        rounded = ((size + (1 << 19)) >> 20).to(tl.int32)
    # 2. The exponent of a group's largest: of each thread's values, then of the warp's threads.
    highest = tl.max(tl.where(alive, rounded, 0), 0, keep_dims=True)
    shared = tl.minimum(tl.maximum(tl.max(highest, 2, keep_dims=True) >> 3, lowest), 255)
    first = tl.arange(0, 32)[None, None, :] == 0
    tl.store(exponents, tl.broadcast_to(shared, group.shape).to(tl.uint8), mask=exists & first)
    # 3. Counted from the lowest code under it.
    least = 0 if SIGNED else tl.minimum(rounded, 1)  # what is above 0 stays so
    codes = tl.minimum(tl.maximum(rounded - ((shared << 3 | 7) - top), least), top)
    if SIGNED:
        codes |= (bits >> 24).to(tl.int32) & 128
    tl.store(addresses(values, at), codes.to(tl.uint8), mask=alive)
