"""Native code for CPU: the packed updates (AVX-512, AVX2 or portable, chosen by the processor), and work with bits.

What a mask update does with bits stands beside the torch expression that it equals, exactly, in toolkit.prune (mask,
packing, select), where `fits` says so.
"""

import array
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.kernels.compiled import library


class PackedTensor(NamedTuple):
    """What a kernel is told of one tensor, or of a span of one (toolkit.prune.spans).

    weight, grad: float32 or bfloat16, n elements in the same memory order without gaps
    mask, offsets: as toolkit.prune.packing makes them; None for a dense tensor
    moments: float32, bfloat16 or, as 8-bit codes, uint8 [survivors] each; all of one dtype. Of a span with a mask those
        of all its tensor, whose survivors the offsets count
    exponents: uint8 [ceil(n / 256)] for each moment of 8 bits (toolkit.kernels.narrow)
    seed: of the chances by which narrow moments and bfloat16 weights are rounded
    first: place of the first weight in the whole parameter
    """

    weight: Tensor
    grad: Tensor
    mask: Tensor | None
    offsets: Tensor | None
    moments: Sequence[Tensor]
    exponents: Sequence[Tensor] = ()
    seed: int = 0
    first: int = 0


ISAS = ("portable", "avx2", "avx512")  # position = the number packed.cpp knows it by


def fits(tensor: Tensor) -> bool:
    """Whether the native code for bits takes this tensor: float32, uint8 or bool, on CPU, without gaps."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.uint8, torch.bool)
        and tensor.is_contiguous()
        and type(tensor) in (Tensor, torch.nn.Parameter)  # a fake or traced tensor has no memory to point at
        and library() is not None
    )


def native_code() -> ctypes.CDLL:
    """The compiled library. Raises RuntimeError where there is none."""
    found = library()
    if found is None:  # the caller has asked `available` before
        raise RuntimeError("the native code could not be built; use implementation=reference")
    return found


def check_memory(
    tensors: Sequence[PackedTensor], dtypes: tuple[torch.dtype, ...], moment_dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError unless all tensors are what a kernel takes their addresses for.

    All weights are of one of `dtypes`, all moments of one of `moment_dtypes`, and all on one device. A model that is
    cast or moved between two steps keeps its parameters' identity; what has been packed stays.
    """
    like, state = tensors[0][0], tensors[0][4][0]
    wanted = (like.dtype, like.dtype, state.dtype, like.device, like.device, like.device)
    known = like.dtype in dtypes and state.dtype in moment_dtypes
    for weight, grad, _, _, moments, *_ in tensors:
        kept = moments[0]
        found = (weight.dtype, grad.dtype, kept.dtype, weight.device, grad.device, kept.device)
        if not known or found != wanted or weight.numel() != grad.numel():
            raise ValueError(
                f"a pruned parameter is {weight.dtype} on {weight.device}, its gradient {grad.dtype} on {grad.device}, "
                f"its moments {kept.dtype} on {kept.device}; cast or move the model before training, or load "
                "the optimizer's state after it"
            )


@functools.cache
def best_isa() -> str:
    """The fastest code this processor runs."""
    return ISAS[native_code().packed_best_isa()]


def address_columns(tensors: Sequence[PackedTensor]) -> list[list[int]]:
    """The first eight columns of the table that packed.h and the Triton kernels read, whose rows are tensors.

    By columns, for what Python takes to look up 161 tensors is a tenth of a step.
    """
    weights, grads, masks, offsets, moments, *_ = zip(*tensors, strict=True)
    sizes = [weight.numel() for weight in weights]
    return [sizes, *map(_addresses, (weights, grads, masks, offsets)), *three_columns(moments)]


def three_columns(rows: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Addresses of up to three tensors a row, 0 for those there are not."""
    columns = [_addresses(column) for column in itertools.zip_longest(*rows)]
    return columns + [[0] * len(rows)] * (3 - len(columns))


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def table_of(columns: Iterable[Iterable[int]]) -> "array.array[int]":
    """Row by row, as the kernels read it."""
    return array.array("q", list(itertools.chain.from_iterable(zip(*columns, strict=True))))


def _launch(
    name: str,
    tensors: Sequence[PackedTensor],
    hyper: Sequence[float],
    isa: str | None,
    stochastic_weights: bool,
    *more: int,
) -> None:
    """Run `packed_` or `narrow_` code of this name, whichever the moments' dtype asks for, on all tensors."""
    floats = (torch.float32, torch.bfloat16)
    check_memory(tensors, floats if stochastic_weights else floats[:1], (*floats, torch.uint8))
    width, weight_width = tensors[0][4][0].element_size(), tensors[0][0].element_size()
    *_, exponents, seeds, firsts = zip(*tensors, strict=True)
    table = table_of([*address_columns(tensors), *three_columns(exponents), seeds, firsts])
    call = getattr(native_code(), f"{'packed' if width == 4 else 'narrow'}_{name}")
    numbers, which = (ctypes.c_float * len(hyper))(*hyper), ISAS.index(isa or best_isa())
    sizes = [weight_width, *[width] * (width < 4)]
    call(which, torch.get_num_threads(), len(tensors), table.buffer_info()[0], numbers, *more, *sizes)


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
    stochastic_weights: bool = False,
    isa: str | None = None,
) -> None:
    """`adam_update` for the survivors of pruned tensors, or for dense ones, on CPU, in place, all tensors in one call.

    Moments are exp_avg, exp_avg_sq and, for AMSGrad, max_exp_avg_sq. Weights may be bfloat16, which are then rounded by
    chance, where `stochastic_weights` says so. `isa` picks the code (tests, benchmarks); None is
    the processor's best.
    """
    hyper = (
        1 - lr * weight_decay if decoupled else 1.0,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** -0.5,
        eps,
        lr / (1 - beta1**step),
        0.0 if decoupled else weight_decay,
    )
    _launch("adam", tensors, hyper, isa, stochastic_weights)


def packed_sgd(
    tensors: Sequence[PackedTensor],
    *,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    decoupled: bool,
    stochastic_weights: bool = False,
    isa: str | None = None,
) -> None:
    """`sgd_update` for the survivors of pruned tensors; the only moment is momentum_buffer. See `packed_adam`."""
    decay = 1 - lr * weight_decay if decoupled else 1.0
    hyper = (decay, momentum, 1 - dampening, lr, 0.0 if decoupled else weight_decay)
    _launch("sgd", tensors, hyper, isa, stochastic_weights, int(nesterov), int(step == 1))


KERNELS: dict[str, Callable[..., None]] = {"adam": packed_adam, "sgd": packed_sgd}
