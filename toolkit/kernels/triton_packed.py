"""The updates of moments on a GPU, packed or dense: one Triton kernel for all tensors of a call, on CUDA and ROCm.

Step and learning rate may lie on the device, so nothing is copied to the host, and a captured graph counts on by
itself. What runs there is toolkit.kernels.triton_kernels.
"""

import array
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.kernels import triton_kernels
from toolkit.kernels.narrow import GROUP
from toolkit.kernels.native import PackedTensor, address_columns, check_memory, table_of, three_columns

_BLOCK = triton_kernels.BLOCK.value
_WEIGHTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_MOMENTS = {**_WEIGHTS, torch.uint8: tl.uint8}

# What only a GPU can decide, as compile-time constants; a bench may change them.
VARIANT: dict[str, int | bool] = {
    "EAGER": True,  # ask for weights and gradients before it is known which survive: one wait for memory less
    "num_warps": 4,  # per 1,024 weights; 8 need fewer registers a thread
}


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class AddressTable:
    """What a kernel finds its tensors by, on their device: `rows`, a row of numbers a tensor, and `programs`.

    The rows are copied only when an address has changed, by a copy that does not wait. A captured step gets rows of its
    own: every replay copies them again, so both ends of that copy live as long as this table.
    """

    def __init__(self) -> None:
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.programs = torch.zeros(0, 2, dtype=torch.int32)  # [blocks of all tensors, 2]: tensor, block within it
        self._sizes: list[int] = []
        self._known = array.array("q")  # what `_own` holds
        self._own = self.rows
        self._spare: tuple[Tensor, Tensor] | None = None  # for a capture, in which pinned memory may not be had
        self._captured: list[tuple[Tensor, Tensor]] = []

    def update(self, tensors: Sequence[PackedTensor], param_indices: Sequence[int]) -> "AddressTable":
        """Bring the table to these tensors; `param_indices` seed the rounding of narrow moments by chance.

        Raises ValueError where tensors are not what they were, RuntimeError where the first step is a captured one.
        """
        check_memory(tensors, tuple(_WEIGHTS), tuple(_MOMENTS))
        device, sizes = tensors[0][0].device, [tensor[0].numel() for tensor in tensors]
        columns = [*address_columns(tensors), param_indices]
        if tensors[0][4][0].dtype is torch.uint8 or tensors[0][0].dtype is torch.bfloat16:
            *_, exponents, _, firsts = zip(*tensors, strict=True)
            columns += [*three_columns(exponents), firsts]
        numbers = table_of(columns)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and sizes != self._sizes:
            raise RuntimeError("no step has run since the last mask update; call step() once, then capture one")
        if sizes != self._sizes:
            self._sizes, self._known, self._spare = sizes, array.array("q"), None
            self.programs = _on_device(_programs(sizes), device)
        if capturing:
            self.rows = self._rows_of_a_graph(numbers, device)
            return self
        if numbers != self._known:
            rows = torch.frombuffer(numbers, dtype=torch.int64)
            if self._own.numel() == rows.numel():  # in place: whatever stream reads it comes after or before
                self._own.copy_(_pinned(rows, device), non_blocking=True)
            else:
                self._own = _on_device(rows, device)
            self._known = numbers
        if device.type == "cuda" and self._spare is None:
            self._spare = _pinned(torch.zeros_like(self._own, device="cpu"), device), torch.empty_like(self._own)
        self.rows = self._own
        return self

    def _rows_of_a_graph(self, numbers: "array.array[int]", device: torch.device) -> Tensor:
        pinned, rows = self._spare or (torch.empty(len(numbers), dtype=torch.int64, pin_memory=True), None)
        rows = torch.empty_like(pinned, device=device) if rows is None else rows
        self._spare = None
        pinned.copy_(torch.frombuffer(numbers, dtype=torch.int64))
        rows.copy_(pinned, non_blocking=True)
        self._captured.append((pinned, rows))
        return rows


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """On CPU, where a copy to `device` need not wait for it; torch keeps the memory until the copy is done."""
    return values.pin_memory() if device.type == "cuda" else values


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    return _pinned(values, device).to(device, non_blocking=True)


def _programs(sizes: Sequence[int]) -> Tensor:
    """int32 [blocks of all tensors, 2]: the tensor each program works on, and the block within it."""
    blocks = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes], device="cpu")
    tensors = torch.arange(len(sizes), device="cpu").repeat_interleave(blocks)
    within = torch.arange(len(tensors), device="cpu") - (blocks.cumsum(0) - blocks)[tensors]
    return torch.stack((tensors, within), 1).to(torch.int32)


def flags(
    weight_dtype: torch.dtype,
    state_dtype: torch.dtype,
    *,
    dense: bool = False,
    stochastic: bool = True,
    stochastic_weights: bool = False,
    decoupled: bool = True,
    lr_on_device: bool = False,
) -> dict[str, Any]:
    """Compile-time constants that all kernels share, and the number of warps; a kernel's own come beside them."""
    # A group of 8-bit codes is a warp's.
    warps = _BLOCK // GROUP if state_dtype is torch.uint8 else int(VARIANT["num_warps"])
    return {
        "ROWS": _BLOCK // 32 // warps,
        "WARPS": warps,
        "WEIGHT": _WEIGHTS[weight_dtype],
        "STATE": _MOMENTS[state_dtype],
        "DENSE": dense,
        "STOCHASTIC": stochastic,
        "STOCHASTIC_WEIGHTS": stochastic_weights,
        "DECOUPLED": decoupled,
        "LR_ON_DEVICE": lr_on_device,
        "EAGER": VARIANT["EAGER"],
        "num_warps": warps,
    }


def _launch(
    kernel: Any,
    tensors: Sequence[PackedTensor],
    table: AddressTable,
    counter: Tensor,
    lr: float | Tensor,
    *numbers: float,
    stochastic: bool,
    stochastic_weights: bool,
    decoupled: bool,
    **own: bool,
) -> None:
    weight, _, mask, _, moments, *_ = tensors[0]
    device, on_device = weight.device, isinstance(lr, Tensor)
    constants = flags(
        weight.dtype,
        moments[0].dtype,
        dense=mask is None,
        stochastic=stochastic,
        stochastic_weights=stochastic_weights,
        decoupled=decoupled,
        lr_on_device=on_device,
    )
    # Triton launches on the current device, and addresses in a table do not tell it theirs.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(len(table.programs),)](
            table.rows,
            table.programs,
            counter,
            lr if on_device else counter,
            0.0 if on_device else lr,
            *numbers,
            **constants,
            **own,
        )


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
    stochastic: bool = True,
    stochastic_weights: bool = False,
    spike_threshold: float | None = None,
    scale: float = 1.0,
) -> None:
    """`adam_update` for the survivors of pruned tensors on a GPU, or for dense tensors (mask and offsets None).

    In place, in one launch. `table` was brought to these tensors; `counter` holds the step on the device, as float32;
    `lr` is a number, or a tensor on the device. Weights and moments are float32 or bfloat16, moments 8-bit codes too,
    computed with in float32; bfloat16 and squared 8-bit moments are rounded by chance where `stochastic`, bfloat16
    weights where `stochastic_weights`. A `spike_threshold` makes it SPAM's step, whose gradients are clipped (inf: not
    now) and whose decay comes last; `scale` is the warm-up's.
    """
    _launch(
        triton_kernels.adam_kernel,
        tensors,
        table,
        counter,
        lr,
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        weight_decay,
        spike_threshold or 0.0,
        scale,
        stochastic=stochastic,
        stochastic_weights=stochastic_weights,
        decoupled=decoupled,
        AMSGRAD=len(tensors[0][4]) == 3,
        SPAM=spike_threshold is not None,
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
    stochastic: bool = True,
    stochastic_weights: bool = False,
) -> None:
    """`sgd_update` for the survivors of pruned tensors, or for dense ones; at step 1 the buffer is the gradient."""
    _launch(
        triton_kernels.sgd_kernel,
        tensors,
        table,
        counter,
        lr,
        momentum,
        1 - dampening,
        weight_decay,
        stochastic=stochastic,
        stochastic_weights=stochastic_weights,
        decoupled=decoupled,
        NESTEROV=nesterov,
    )


KERNELS: dict[str, Callable[..., None]] = {"adam": packed_adam, "sgd": packed_sgd}
