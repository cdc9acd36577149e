"""The packed updates on a GPU: one Triton kernel for all tensors of a call, on CUDA and ROCm.

A program works on one block of 1,024 weights. It finds its tensor by a binary search in a table of addresses, and its
survivors by the running count of the block's mask bits, so that nothing is read but weight, gradient, bits and the
survivors' moments. Step and learning rate may lie on the device: nothing is copied to the host, and a captured graph
counts on by itself.
"""

# Kernels take what Triton gives them: pointers, blocks and compile-time constants have no Python types.
# ruff: noqa: ANN001, ANN202, SIM300
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import array
import math
import os
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.kernels.native import PackedTensor, address_row, check_memory

_BLOCK = tl.constexpr(1024)  # as toolkit.prune.packing; a table entry of the offsets covers one
_ROW = tl.constexpr(10)  # numel, weight, grad, mask, offsets, three moments, first block, place


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class AddressTable:
    """The table a kernel finds its tensors by, on the device; copied again only when an address has changed."""

    def __init__(self) -> None:
        self.rows = array.array("q")
        self.blocks = 0
        self.on_device = torch.zeros(0, dtype=torch.int64)

    def update(self, tensors: Sequence[PackedTensor], places: Sequence[int]) -> "AddressTable":
        """Bring the table to these tensors; `places` seed the stochastic rounding of bfloat16 moments."""
        check_memory(tensors, (torch.float32, torch.bfloat16))
        rows = array.array("q")
        blocks = 0
        for tensor, place in zip(tensors, places, strict=True):
            rows.extend((*address_row(*tensor), blocks, place))
            blocks += tensor[3].numel()  # an offset each
        if rows != self.rows:
            device = tensors[0][0].device
            table = torch.frombuffer(rows, dtype=torch.int64)
            # From pinned memory the copy does not wait; torch keeps the memory until it is done.
            self.on_device = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
            self.rows, self.blocks = rows, blocks
        return self


@triton.jit
def _find_tensor(table, tensors, program, SEARCH: tl.constexpr):
    """Address of the row of the tensor that block number `program` belongs to."""
    low = tl.zeros((), dtype=tl.int32)
    high = low + tensors
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        here = tl.load(table + middle * _ROW + 8) <= program
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return table + low * _ROW


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
def _store_moment(pointer, at, values, alive, step, place, NUMBER: tl.constexpr, STATE: tl.constexpr):
    """Store survivors' moments; bfloat16 ones with the reference's stochastic rounding, to the same bits."""
    if STATE == tl.float32:
        tl.store(pointer + at, values, mask=alive)
    else:
        seed = (step.to(tl.uint32) * 65537 + place.to(tl.uint32)) * 3 + NUMBER
        noise = _hash(at.to(tl.uint32) + seed * 0x9E3779B9) & 0xFFFF
        bits = values.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        rounded = (bits + tl.where(finite, noise, 0)) & 0xFFFF0000
        tl.store(pointer + at, rounded.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=alive)


@triton.jit
def _block(table, tensors, SEARCH: tl.constexpr):
    """(row, positions of the block's weights, which of them there are, which survive, where their moments lie)."""
    program = tl.program_id(0)
    row = _find_tensor(table, tensors, program, SEARCH)
    block = program - tl.load(row + 8).to(tl.int32)
    lane = tl.arange(0, _BLOCK)
    position = block.to(tl.int64) * _BLOCK + lane
    inside = position < tl.load(row)
    mask = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
    byte = tl.load(mask + position // 8, mask=inside, other=0).to(tl.int32)
    alive = ((byte >> (lane % 8)) & 1) == 1
    offsets = tl.load(row + 4).to(tl.pointer_type(tl.int32))
    count = alive.to(tl.int32)
    at = tl.load(offsets + block) + tl.cumsum(count, 0) - count
    return row, position, inside, alive, at


@triton.jit
def _read(
    row, position, alive, counter, lr_on_device, lr, weight_decay, DECOUPLED: tl.constexpr, LR_ON_DEVICE: tl.constexpr
):
    """(step, learning rate, address of the weights, survivors' gradients, their weights after decoupled decay)."""
    rate = tl.load(lr_on_device).to(tl.float32) if LR_ON_DEVICE else lr
    weights = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    weight = tl.load(weights + position, mask=alive, other=0.0)
    grad = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + position, mask=alive, other=0.0)
    if DECOUPLED:
        weight = weight * (1 - rate * weight_decay)
    else:
        grad = grad + weight_decay * weight
    return tl.load(counter), rate, weights, grad, weight


@triton.jit
def _adam_kernel(
    table,
    tensors,
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
    SEARCH: tl.constexpr,
    STATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
):
    row, position, inside, alive, at = _block(table, tensors, SEARCH)
    step, rate, weights, grad, decayed = _read(
        row, position, alive, counter, lr_on_device, lr, weight_decay, DECOUPLED, LR_ON_DEVICE
    )
    exp_avg = tl.load(row + 5).to(tl.pointer_type(STATE))
    exp_avg_sq = tl.load(row + 6).to(tl.pointer_type(STATE))
    place = tl.load(row + 9)
    first = tl.load(exp_avg + at, mask=alive, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq + at, mask=alive, other=0.0).to(tl.float32)
    first = first + (grad - first) * one_minus_beta1
    second = second * beta2 + grad * grad * one_minus_beta2
    _store_moment(exp_avg, at, first, alive, step, place, 0, STATE)
    _store_moment(exp_avg_sq, at, second, alive, step, place, 1, STATE)
    if AMSGRAD:
        highest = tl.load(row + 7).to(tl.pointer_type(STATE))
        second = tl.maximum(tl.load(highest + at, mask=alive, other=0.0).to(tl.float32), second)
        _store_moment(highest, at, second, alive, step, place, 2, STATE)
    denominator = tl.sqrt(second) / tl.sqrt(_one_minus_power(log_beta2, step)) + eps
    moved = decayed - rate / _one_minus_power(log_beta1, step) * (first / denominator)
    tl.store(weights + position, tl.where(alive, moved, 0.0), mask=inside)  # pruned places are 0 again


@triton.jit
def _sgd_kernel(
    table,
    tensors,
    counter,
    lr_on_device,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    SEARCH: tl.constexpr,
    STATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    NESTEROV: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
):
    row, position, inside, alive, at = _block(table, tensors, SEARCH)
    step, rate, weights, grad, decayed = _read(
        row, position, alive, counter, lr_on_device, lr, weight_decay, DECOUPLED, LR_ON_DEVICE
    )
    buffers = tl.load(row + 5).to(tl.pointer_type(STATE))
    buffer = tl.load(buffers + at, mask=alive, other=0.0).to(tl.float32)
    buffer = tl.where(step == 1, grad, buffer * momentum + grad * one_minus_dampening)
    _store_moment(buffers, at, buffer, alive, step, tl.load(row + 9), 0, STATE)
    moved = decayed - rate * (grad + momentum * buffer if NESTEROV else buffer)
    tl.store(weights + position, tl.where(alive, moved, 0.0), mask=inside)  # pruned places are 0 again


def _constants(tensors: Sequence[PackedTensor], lr: float | Tensor, decoupled: bool) -> dict[str, object]:
    return {
        "SEARCH": max(1, math.ceil(math.log2(len(tensors) + 1))),
        "STATE": tl.bfloat16 if tensors[0][4][0].dtype is torch.bfloat16 else tl.float32,
        "DECOUPLED": decoupled,
        "LR_ON_DEVICE": isinstance(lr, Tensor),
    }


def packed_adam(
    tensors: Sequence[PackedTensor],
    table: AddressTable,
    counter: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """`adam_update` for the survivors of pruned tensors on a GPU, in place, in one launch.

    `table` was brought to these tensors; `counter` holds the step on the device, as float32; `lr` is a number, or a
    tensor on the device. Moments may be bfloat16.
    """
    on_device = isinstance(lr, Tensor)
    _adam_kernel[(table.blocks,)](
        table.on_device,
        len(tensors),
        counter,
        lr if on_device else counter,
        0.0 if on_device else lr,
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        weight_decay,
        AMSGRAD=len(tensors[0][4]) == 3,
        **_constants(tensors, lr, decoupled),
    )


def packed_sgd(
    tensors: Sequence[PackedTensor],
    table: AddressTable,
    counter: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    decoupled: bool,
) -> None:
    """`sgd_update` for the survivors of pruned tensors; at step 1 the buffer starts with the gradient."""
    on_device = isinstance(lr, Tensor)
    _sgd_kernel[(table.blocks,)](
        table.on_device,
        len(tensors),
        counter,
        lr if on_device else counter,
        0.0 if on_device else lr,
        momentum,
        1 - dampening,
        weight_decay,
        NESTEROV=nesterov,
        **_constants(tensors, lr, decoupled),
    )


KERNELS: dict[str, Callable[..., None]] = {"adam": packed_adam, "sgd": packed_sgd}
