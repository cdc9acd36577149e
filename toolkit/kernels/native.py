"""The packed updates in native code for CPU: AVX-512, AVX2 or portable, chosen by the processor.

packed.cpp is built on first use by torch's extension builder into a folder of this process and moved into the cache as
a whole: a build that is killed leaves nothing that a later run could wait for. Without a compiler one warning says what
is lost, and the reference takes over.
"""

import array
import ctypes
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from toolkit.log import get_logger

__all__ = ["ISAS", "PackedTensor", "available", "best_isa", "packed_adam", "packed_sgd"]

# weight and grad: float32 [n] in memory order; mask and offsets as toolkit.prune.packing makes them; moments: float32
# [survivors] each.
PackedTensor = tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]

ISAS = ("portable", "avx2", "avx512")  # position = the number packed.cpp knows it by
_SOURCE = Path(__file__).with_name("packed.cpp")
_FLAGS = ("-O3", "-fno-math-errno", "-fopenmp")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "adamwprune-toolkit"


def _build(target: Path) -> None:
    """Compile packed.cpp to `target`, atomically."""
    from torch.utils.cpp_extension import load

    target.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), path))  # a virtual environment's ninja
    try:
        load("packed", [str(_SOURCE)], extra_cflags=list(_FLAGS), extra_ldflags=["-fopenmp"],
             build_directory=str(own), is_python_module=False)  # fmt: skip
        next(own.glob("packed*.so")).replace(target)  # torch numbers a second build in one process
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(own, ignore_errors=True)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had (said once)."""
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
    target = _cache_folder() / f"packed-{key}.so"
    try:
        if not target.exists():
            _build(target)
        library = ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ImportError) as error:
        get_logger().warning(
            "no native update on CPU (%s): the reference path takes over, several times slower; a C++ compiler and "
            "ninja make it available", str(error).splitlines()[0] if str(error) else type(error).__name__,
        )  # fmt: skip
        return None
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.packed_adam.argtypes = [number, number, long, pointer, pointer]
    library.packed_sgd.argtypes = [number, number, long, pointer, pointer, number, number]
    return library


def available() -> bool:
    """Whether the native code could be built or found."""
    return _library() is not None


@functools.cache
def best_isa() -> str:
    """The fastest code this processor runs."""
    library = _library()
    assert library is not None
    return ISAS[library.packed_best_isa()]


def _table(tensors: Sequence[PackedTensor]) -> "array.array[int]":
    """One row of eight numbers a tensor, as packed.cpp reads them."""
    rows = array.array("q")
    for weight, grad, mask, offsets, moments in tensors:
        assert weight.numel() == grad.numel()
        for tensor in (weight, grad, *moments):
            assert tensor.dtype is torch.float32, tensor.dtype
            assert tensor.is_contiguous(), tensor.stride()
        addresses = [tensor.data_ptr() for tensor in (weight, grad, mask, offsets, *moments)]
        rows.extend([weight.numel(), *addresses, *[0] * (7 - len(addresses))])
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
    library = _library()
    assert library is not None
    table = _table(tensors)
    hyper = (ctypes.c_float * 8)(
        1 - lr * weight_decay if decoupled else 1.0, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, eps,
        lr / (1 - beta1**step), 0.0 if decoupled else weight_decay,
    )  # fmt: skip
    library.packed_adam(
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
    library = _library()
    assert library is not None
    table = _table(tensors)
    hyper = (ctypes.c_float * 5)(
        1 - lr * weight_decay if decoupled else 1.0, momentum, 1 - dampening, lr, 0.0 if decoupled else weight_decay
    )
    library.packed_sgd(
        ISAS.index(isa or best_isa()), torch.get_num_threads(), len(tensors), table.buffer_info()[0], hyper,
        int(nesterov), int(first),
    )  # fmt: skip
