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

BLOCK = tl.constexpr(1024)  # as toolkit.prune.packing; a table entry of the offsets covers one
ROW = tl.constexpr(9)  # numel, weight, grad, mask, offsets, three moments, the parameter's index


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step in float32 without losing digits where it is small: Taylor's series of expm1 below 0.1."""
    x = log_beta * step
    series = -x * (1 + x * (1.0 / 2) * (1 + x * (1.0 / 3) * (1 + x * (1.0 / 4) * (1 + x * (1.0 / 5)))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def _hash(values):
    """As toolkit.kernels.rounding: uint32 -> uint32 (lowbias32)."""
    values = values ^ (values >> 16)
    values = values * 0x7FEB352D
    values = values ^ (values >> 15)
    values = values * 0x846CA68B
    return values ^ (values >> 16)


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
def _addresses(pointer, at):
    """Of a block's elements. The hint only ranks the axes, so that lanes get the last and warps the middle one.

    Without it the version decides, and 3.6 moves every block through shared memory. It cannot widen an access: nothing
    is known of the alignment of an address that was read from memory.
    """
    return tl.max_contiguous(pointer + at, [1, 2, 4])


@triton.jit
def _load(pointer, at, mask):
    return tl.load(_addresses(pointer, at), mask=mask).to(tl.float32)


@triton.jit
def _store_bfloat16(pointer, at, values, mask, noise):
    """Store float32 as bfloat16: the upper bits after `noise`, below 2^16, was added."""
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    upper = (bits + tl.where(finite, noise, 0)) >> 16
    tl.store(_addresses(pointer, at), upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)


@triton.jit
def _store(pointer, at, values, mask, TYPE: tl.constexpr):
    """Store rounded to the nearest, ties to even, as torch's copy does."""
    if TYPE == tl.float32:
        tl.store(_addresses(pointer, at), values, mask=mask)
    else:  # with bits, because Triton's interpreter cuts off
        odd = (values.to(tl.uint32, bitcast=True) >> 16) & 1
        _store_bfloat16(pointer, at, values, mask, odd + 0x7FFF)


@triton.jit
def _store_moment(
    pointer, start, at, values, alive, step, index, NUMBER: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Store moments; stochastic rounding to bfloat16 is the reference's, to the same bits."""
    if STATE == tl.float32 or not STOCHASTIC:
        _store(pointer, at, values, alive, STATE)
    else:
        seed = (step.to(tl.uint32) * 65537 + index.to(tl.uint32)) * 3 + NUMBER
        noise = _hash(at.to(tl.uint32) + (start.to(tl.uint32) + seed * 0x9E3779B9)) & 0xFFFF
        _store_bfloat16(pointer, at, values, alive, noise)


@triton.jit
def _block(rows, programs, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """(row of the tensor, block, its first weight, each weight's place in it, how many there are)."""
    program = programs + 2 * tl.program_id(0)
    row = rows + tl.load(program) * ROW
    block = tl.load(program + 1)
    start = block.to(tl.int64) * BLOCK
    word = tl.arange(0, WARPS)[None, :, None] * ROWS + tl.arange(0, ROWS)[:, None, None]
    position = word * 32 + tl.arange(0, 32)[None, None, :]
    left = tl.minimum(tl.load(row) - start, BLOCK).to(tl.int32)
    return row, block, start, position, left


@triton.jit
def _survivors(mask, position, left, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """(which weights survive, each survivor's place among the block's), from the block's bits."""
    # 1. Whole words, and the last one of a tensor that ends within it byte by byte: nothing is read beyond the mask.
    size = (left + 7) // 8
    whole = size // 4
    tail = tl.zeros((), dtype=tl.uint32)
    for byte in tl.static_range(3):
        here = whole * 4 + byte
        tail |= tl.load(mask + here, mask=here < size, other=0).to(tl.uint32) << (8 * byte)
    words = mask.to(tl.pointer_type(tl.uint32))
    at = position // 32
    word = tl.load(_addresses(words, at), mask=at < whole, other=tail)
    # 2. Survivors of earlier warps, of the warp's earlier words, and of the word's earlier bits.
    warp, every = tl.arange(0, WARPS)[:, None], tl.arange(0, 32)[None, :]
    earlier = tl.load(words + every + warp * 0, mask=(every < warp * ROWS) & (every < whole), other=0)
    count = _count_bits(word)
    bit = (position % 32).to(tl.uint32)
    rank = _count_bits(word & ((1 << bit) - 1)) + (tl.cumsum(count, 0) - count)
    rank += tl.sum(_count_bits(earlier), 1)[None, :, None]
    alive = (((word >> bit) & 1) == 1) & (position < left)
    return alive, rank.to(tl.int32)


@triton.jit
def _read(
    rows,
    programs,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    DENSE: tl.constexpr,
    EAGER: tl.constexpr,
):
    """(row, addresses of weights, place of each in the block, inside, alive, first moment, place, weight, gradient)."""
    row, block, start, position, left = _block(rows, programs, ROWS, WARPS)
    weights = tl.load(row + 1).to(tl.pointer_type(WEIGHT)) + start
    grads = tl.load(row + 2).to(tl.pointer_type(WEIGHT)) + start
    inside = position < left
    if DENSE:
        alive, first, at = inside, start, position
        weight, grad = _load(weights, position, inside), _load(grads, position, inside)
    else:
        mask = tl.load(row + 3).to(tl.pointer_type(tl.uint8)) + start // 8
        first = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.int32)) + block).to(tl.int64)
        if EAGER:
            weight, grad = _load(weights, position, inside), _load(grads, position, inside)
            tl.debug_barrier()  # or NVIDIA's assembler asks for them after it has waited for the bits
        alive, at = _survivors(mask, position, left, ROWS, WARPS)
        if not EAGER:
            weight, grad = _load(weights, position, alive), _load(grads, position, alive)
    return row, weights, position, inside, alive, first, at, weight, grad


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
    DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SPAM: tl.constexpr,
) -> None:
    """Adam(W)'s step, or with SPAM its own; computed in float32."""
    row, weights, position, inside, alive, start, at, weight, grad = _read(
        rows, programs, ROWS, WARPS, WEIGHT, DENSE, EAGER
    )
    rate = tl.load(lr_on_device).to(tl.float32) if LR_ON_DEVICE else lr
    step, index, shrink = tl.load(counter), tl.load(row + 8), 1 - rate * weight_decay
    exp_avg = tl.load(row + 5).to(tl.pointer_type(STATE)) + start
    exp_avg_sq = tl.load(row + 6).to(tl.pointer_type(STATE)) + start
    first, second = _load(exp_avg, at, alive), _load(exp_avg_sq, at, alive)
    if SPAM:
        bound = tl.sqrt(second * spike_threshold)
        grad = tl.where(grad * grad > second * spike_threshold, tl.where(grad < 0, -bound, bound), grad)
    elif DECOUPLED:
        weight = weight * shrink
    else:
        grad = grad + weight_decay * weight
    first = first + (grad - first) * one_minus_beta1
    second = second * beta2 + grad * grad * one_minus_beta2
    _store_moment(exp_avg, start, at, first, alive, step, index, 0, STATE, STOCHASTIC)
    _store_moment(exp_avg_sq, start, at, second, alive, step, index, 1, STATE, STOCHASTIC)
    if AMSGRAD:
        highest = tl.load(row + 7).to(tl.pointer_type(STATE)) + start
        second = tl.maximum(_load(highest, at, alive), second)
        _store_moment(highest, start, at, second, alive, step, index, 2, STATE, STOCHASTIC)
    # Bias corrections are one number a program.
    step_size = scale * rate / _one_minus_power(log_beta1, step)
    correction = 1 / tl.sqrt(_one_minus_power(log_beta2, step))
    if SPAM:
        weight = (weight - step_size * _ratio(first, (tl.sqrt(second) + eps) * correction)) * shrink
    else:
        weight = weight - step_size * _ratio(first, tl.sqrt(second) * correction + eps)
    _store(weights, position, tl.where(alive, weight, 0.0), inside, WEIGHT)  # pruned places are 0 again


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
    DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    NESTEROV: tl.constexpr,
) -> None:
    """SGD's step; computed in float32."""
    row, weights, position, inside, alive, start, at, weight, grad = _read(
        rows, programs, ROWS, WARPS, WEIGHT, DENSE, EAGER
    )
    rate = tl.load(lr_on_device).to(tl.float32) if LR_ON_DEVICE else lr
    step = tl.load(counter)
    if DECOUPLED:
        weight = weight * (1 - rate * weight_decay)
    else:
        grad = grad + weight_decay * weight
    buffers = tl.load(row + 5).to(tl.pointer_type(STATE)) + start
    buffer = _load(buffers, at, alive)
    buffer = tl.where(step == 1, grad, buffer * momentum + grad * one_minus_dampening)
    _store_moment(buffers, start, at, buffer, alive, step, tl.load(row + 8), 0, STATE, STOCHASTIC)
    weight = weight - rate * (grad + momentum * buffer if NESTEROV else buffer)
    _store(weights, position, tl.where(alive, weight, 0.0), inside, WEIGHT)  # pruned places are 0 again
