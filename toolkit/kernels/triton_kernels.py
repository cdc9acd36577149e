"""The update of moments as Triton code, packed or dense, on CUDA and ROCm; triton_packed launches it.

A program works on one block of 1,024 weights. Two numbers tell it its tensor and its block, a table of addresses where
they lie, and the counts of mask bits before each weight where the survivors' moments are: nothing is read but weight,
gradient, bits and moments.

Shapes: a block is [ROWS, WARPS, 32]; each warp has ROWS words of 32 mask bits that follow each other, a thread one bit
of each. So a warp's weights lie side by side, and no warp waits for another.
"""

# Kernels take what Triton gives them: pointers, blocks and compile-time constants have no Python types.
# ruff: noqa: ANN001, ANN202, SIM300
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

from toolkit.kernels.triton_moments import addresses, chance, load, load_moment, moment, store_moment, store_weight

BLOCK = tl.constexpr(1024)  # as toolkit.prune.spans; a table entry of the offsets covers one
# numel, weight, grad, mask, offsets, three moments, the parameter's index
ROW = tl.constexpr(9)
# and with 8-bit codes or bfloat16 weights three addresses of exponents, the first weight's place in the whole parameter
LONG_ROW = tl.constexpr(13)


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step in float32 without losing digits where it is small: Taylor's series of expm1 below 0.1."""
    x = log_beta * step
    series = -x * (1 + x * (1.0 / 2) * (1 + x * (1.0 / 3) * (1 + x * (1.0 / 4) * (1 + x * (1.0 / 5)))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def _count_bits(words):
    """Bits set in each uint32; compilers make this form one instruction."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101) >> 24


@triton.jit
def _ratio(values, above_0):
    """Their ratio, to three units in the last place: a division takes twice the instructions."""
    root = tl.rsqrt(above_0)
    return values * root * root


@triton.jit
def _block(rows, programs, ROWS: tl.constexpr, WARPS: tl.constexpr, WEIGHT: tl.constexpr, STATE: tl.constexpr):
    """(row of the tensor, block, its first weight, each weight's place in it, how many there are)."""
    program = programs + 2 * tl.program_id(0)
    row = rows + tl.load(program) * (LONG_ROW if STATE == tl.uint8 or WEIGHT == tl.bfloat16 else ROW)
    block = tl.load(program + 1)
    start = block.to(tl.int64) * BLOCK
    word = tl.arange(0, WARPS)[None, :, None] * ROWS + tl.arange(0, ROWS)[:, None, None]
    position = word * 32 + tl.arange(0, 32)[None, None, :]
    left = tl.minimum(tl.load(row) - start, BLOCK).to(tl.int32)
    return row, block, start, position, left


@triton.jit
def _survivors(mask, position, left, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """(which weights survive, each one's place among the block's survivors, that of a warp's first), from the bits."""
    # 1. Whole words, and the last one of a tensor that ends within it byte by byte: nothing is read beyond the mask.
    size = (left + 7) // 8
    whole = size // 4
    tail = tl.zeros((), dtype=tl.uint32)
    for byte in tl.static_range(3):
        here = whole * 4 + byte
        tail |= tl.load(mask + here, mask=here < size, other=0).to(tl.uint32) << (8 * byte)
    words = mask.to(tl.pointer_type(tl.uint32))
    at = position // 32
    word = tl.load(addresses(words, at), mask=at < whole, other=tail)
    # 2. Survivors of earlier warps, of the warp's earlier words, and of the word's earlier bits.
    warp, every = tl.arange(0, WARPS)[:, None], tl.arange(0, 32)[None, :]
    earlier = tl.load(words + every + warp * 0, mask=(every < warp * ROWS) & (every < whole), other=0)
    count = _count_bits(word)
    bit = (position % 32).to(tl.uint32)
    rank = _count_bits(word & ((1 << bit) - 1)) + (tl.cumsum(count, 0) - count)
    before = tl.sum(_count_bits(earlier), 1)[None, :, None]
    alive = (((word >> bit) & 1) == 1) & (position < left)
    return alive, (rank + before).to(tl.int32), before.to(tl.int32)


@triton.jit
def _read(
    rows,
    programs,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    DENSE: tl.constexpr,
    EAGER: tl.constexpr,
):
    """(row, first weight, addresses of weights, places of each, inside, alive, where moments are, weight, gradient)."""
    row, block, start, position, left = _block(rows, programs, ROWS, WARPS, WEIGHT, STATE)
    weights = tl.load(row + 1).to(tl.pointer_type(WEIGHT)) + start
    grads = tl.load(row + 2).to(tl.pointer_type(WEIGHT)) + start
    inside = position < left
    near = tl.minimum(position, left - 1)  # behind the end the last weight is read again: see `load`
    warp = tl.arange(0, WARPS)[None, :, None]
    if DENSE:
        alive, first, at, begin = inside, start, position, warp * ROWS * 32
        weight, grad = load(weights, near), load(grads, near)
    else:
        mask = tl.load(row + 3).to(tl.pointer_type(tl.uint8)) + start // 8
        first = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.int32)) + block).to(tl.int64)
        if EAGER:
            weight, grad = load(weights, near), load(grads, near)
            tl.debug_barrier()  # or NVIDIA's assembler asks for them after it has waited for the bits
        alive, at, begin = _survivors(mask, position, left, ROWS, WARPS)
        if not EAGER:
            weight, grad = load(weights, position, alive), load(grads, position, alive)
    group = block * WARPS + warp + (tl.arange(0, 32)[None, None, :] >> 5)  # + 0, which Triton would drop with the axis
    exists = warp * ROWS * 32 < left
    slots = (first, at, alive, begin, group, exists, near)
    return row, start, weights, position, inside, alive, slots, weight, grad


@triton.jit
def adam_kernel(
    rows,
    programs,
    counter,
    lr_on_device,
    lr,
    log_beta1,
    log_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    spike_threshold,
    scale,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    DENSE: tl.constexpr,
    EAGER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STOCHASTIC_WEIGHTS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SPAM: tl.constexpr,
) -> None:
    """Adam(W)'s step, or with SPAM its own; computed in float32."""
    row, start, weights, position, inside, alive, slots, weight, grad = _read(
        rows, programs, ROWS, WARPS, WEIGHT, STATE, DENSE, EAGER
    )
    rate = tl.load(lr_on_device).to(tl.float32) if LR_ON_DEVICE else lr
    step, shrink = tl.load(counter), 1 - rate * weight_decay
    seed = chance(row, step, STATE)
    exp_avg, exp_avg_sq = moment(row, slots, 0, STATE), moment(row, slots, 1, STATE)
    first, second = load_moment(exp_avg, slots, True, STATE, DENSE), load_moment(exp_avg_sq, slots, False, STATE, DENSE)
    if SPAM:
        bound = tl.sqrt(second * spike_threshold)
        grad = tl.where(grad * grad > second * spike_threshold, tl.where(grad < 0, -bound, bound), grad)
    elif DECOUPLED:
        weight = weight * shrink
    else:
        grad = grad + weight_decay * weight
    first = first + (grad - first) * one_minus_beta1
    second = second * beta2 + grad * grad * one_minus_beta2
    store_moment(exp_avg, slots, first, seed, 0, True, STATE, STOCHASTIC)
    store_moment(exp_avg_sq, slots, second, seed, 1, False, STATE, STOCHASTIC)
    if AMSGRAD:
        highest = moment(row, slots, 2, STATE)
        second = tl.maximum(load_moment(highest, slots, False, STATE, DENSE), second)
        store_moment(highest, slots, second, seed, 2, False, STATE, STOCHASTIC)
    step_size = scale * rate / _one_minus_power(log_beta1, step)  # bias corrections are one number a program
    correction = 1 / tl.sqrt(_one_minus_power(log_beta2, step))
    if SPAM:
        weight = (weight - step_size * _ratio(first, (tl.sqrt(second) + eps) * correction)) * shrink
    else:
        weight = weight - step_size * _ratio(first, tl.sqrt(second) * correction + eps)
    weight = tl.where(alive, weight, 0.0)  # pruned places are 0 again
    store_weight(weights, position, weight, inside, row, start, step, WEIGHT, STOCHASTIC_WEIGHTS)


@triton.jit
def sgd_kernel(
    rows,
    programs,
    counter,
    lr_on_device,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    DENSE: tl.constexpr,
    EAGER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STOCHASTIC_WEIGHTS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    NESTEROV: tl.constexpr,
) -> None:
    """SGD's step; computed in float32."""
    row, start, weights, position, inside, alive, slots, weight, grad = _read(
        rows, programs, ROWS, WARPS, WEIGHT, STATE, DENSE, EAGER
    )
    rate = tl.load(lr_on_device).to(tl.float32) if LR_ON_DEVICE else lr
    step = tl.load(counter)
    if DECOUPLED:
        weight = weight * (1 - rate * weight_decay)
    else:
        grad = grad + weight_decay * weight
    buffers = moment(row, slots, 0, STATE)
    buffer = load_moment(buffers, slots, True, STATE, DENSE)
    buffer = tl.where(step == 1, grad, buffer * momentum + grad * one_minus_dampening)
    store_moment(buffers, slots, buffer, chance(row, step, STATE), 0, True, STATE, STOCHASTIC)
    weight = weight - rate * (grad + momentum * buffer if NESTEROV else buffer)
    weight = tl.where(alive, weight, 0.0)  # pruned places are 0 again
    store_weight(weights, position, weight, inside, row, start, step, WEIGHT, STOCHASTIC_WEIGHTS)
