"""The packed updates in native code for CPU: AVX-512, AVX2 or portable, chosen by the processor.

packed.cpp is built on first use by torch's extension builder into a folder of this process and moved into the cache as
a whole: a build that is killed leaves nothing that a later run could wait for. Without a compiler one warning says what
is lost, and the reference takes over.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from toolkit.log import get_logger

__all__ = ["ISAS", "available", "best_isa", "packed_adam", "packed_sgd"]

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
    try:
        load("packed", [str(_SOURCE)], extra_cflags=list(_FLAGS), extra_ldflags=["-fopenmp"],
             build_directory=str(own), is_python_module=False)  # fmt: skip
        next(own.glob("packed*.so")).replace(target)  # torch numbers a second build in one process
    finally:
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
    library.packed_adam.argtypes = [number, number, long, *[pointer] * 8]
    library.packed_sgd.argtypes = [number, number, long, *[pointer] * 6, number, number]
    return library


def available() -> bool:
    """Whether the native code could be built or found."""
    return _library() is not None


def best_isa() -> str:
    """The fastest code this processor runs."""
    library = _library()
    assert library is not None
    return ISAS[library.packed_best_isa()]


def _check(dense: tuple[Tensor, ...], packed: tuple[Tensor, ...]) -> None:
    for tensor in (*dense, *packed):
        assert tensor.dtype == torch.float32, tensor.dtype
        assert tensor.device.type == "cpu", tensor.device
        assert tensor.is_contiguous(), tensor.stride()
    assert len({tensor.numel() for tensor in dense}) == 1
    assert len({tensor.numel() for tensor in packed}) == 1


def packed_adam(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    offsets: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
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
    """`adam_update` for the survivors of a pruned tensor, in place.

    weight, grad: float32 [n] in memory order; mask, offsets: as toolkit.prune.packing makes them; moments: float32
    [survivors]. `isa` picks the code (tests, benchmarks); None is the processor's best.
    """
    library = _library()
    assert library is not None
    _check((weight, grad), (exp_avg, exp_avg_sq) if max_exp_avg_sq is None else (exp_avg, exp_avg_sq, max_exp_avg_sq))
    hyper = (ctypes.c_float * 8)(
        1 - lr * weight_decay if decoupled else 1.0, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, eps,
        lr / (1 - beta1**step), 0.0 if decoupled else weight_decay,
    )  # fmt: skip
    library.packed_adam(
        ISAS.index(isa or best_isa()), torch.get_num_threads(), weight.numel(), weight.data_ptr(), grad.data_ptr(),
        mask.data_ptr(), offsets.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        None if max_exp_avg_sq is None else max_exp_avg_sq.data_ptr(), hyper,
    )  # fmt: skip


def packed_sgd(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    offsets: Tensor,
    momentum_buffer: Tensor,
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
    """`sgd_update` for the survivors of a pruned tensor, in place; shapes as in `packed_adam`."""
    library = _library()
    assert library is not None
    _check((weight, grad), (momentum_buffer,))
    hyper = (ctypes.c_float * 5)(
        1 - lr * weight_decay if decoupled else 1.0, momentum, 1 - dampening, lr, 0.0 if decoupled else weight_decay
    )
    library.packed_sgd(
        ISAS.index(isa or best_isa()), torch.get_num_threads(), weight.numel(), weight.data_ptr(), grad.data_ptr(),
        mask.data_ptr(), offsets.data_ptr(), momentum_buffer.data_ptr(), hyper, int(nesterov), int(first),
    )  # fmt: skip
