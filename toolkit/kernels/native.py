"""The packed updates in native code for CPU: AVX-512, AVX2 or portable, chosen by the processor."""

import array
import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.kernels.compiled import library

__all__ = ["ISAS", "PackedTensor", "best_isa", "packed_adam", "packed_sgd"]

# weight and grad: float32, n elements in the same memory order without gaps; mask and offsets as
# toolkit.prune.packing makes them; moments: float32 [survivors] each.
PackedTensor = tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]

ISAS = ("portable", "avx2", "avx512")  # position = the number packed.cpp knows it by


def _code() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


@functools.cache
def best_isa() -> str:
    """The fastest code this processor runs."""
    return ISAS[_code().packed_best_isa()]


def _table(tensors: Sequence[PackedTensor]) -> "array.array[int]":
    """One row of eight numbers a tensor, as packed.cpp reads them."""
    rows = array.array("q")
    for weight, grad, mask, offsets, moments in tensors:
        assert grad.dtype is moments[0].dtype is torch.float32, (grad.dtype, moments[0].dtype)
        rows.extend((weight.numel(), weight.data_ptr(), grad.data_ptr(), mask.data_ptr(), offsets.data_ptr()))
        rows.extend([moment.data_ptr() for moment in moments])
        rows.extend([0] * (3 - len(moments)))
    return rows


def packed_adam(
    tensors: Sequence[PackedTensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    isa: str | None = None,
) -> None:
    """`adam_update` for the survivors of pruned tensors on CPU, in place, all tensors in one call.

    Moments are exp_avg, exp_avg_sq and, for AMSGrad, max_exp_avg_sq. `isa` picks the code (tests, benchmarks); None is
    the processor's best.
    """
    table = _table(tensors)
    hyper = (ctypes.c_float * 8)(
        1 - lr * weight_decay if decoupled else 1.0,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** -0.5,
        eps,
        lr / (1 - beta1**step),
        0.0 if decoupled else weight_decay,
    )
    _code().packed_adam(
        ISAS.index(isa or best_isa()), torch.get_num_threads(), len(tensors), table.buffer_info()[0], hyper
    )


def packed_sgd(
    tensors: Sequence[PackedTensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    decoupled: bool,
    first: bool,
    isa: str | None = None,
) -> None:
    """`sgd_update` for the survivors of pruned tensors; the only moment is momentum_buffer. See `packed_adam`."""
    table = _table(tensors)
    hyper = (ctypes.c_float * 5)(
        1 - lr * weight_decay if decoupled else 1.0, momentum, 1 - dampening, lr, 0.0 if decoupled else weight_decay
    )
    _code().packed_sgd(
        ISAS.index(isa or best_isa()),
        torch.get_num_threads(),
        len(tensors),
        table.buffer_info()[0],
        hyper,
        int(nesterov),
        int(first),
    )
