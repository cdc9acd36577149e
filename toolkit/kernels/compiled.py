"""The C++ sources of this folder as one library, compiled on first use.

Built by torch's extension builder into a folder of this process and moved into the cache as a whole: a build that is
killed leaves nothing that a later run could wait for. Without a compiler one warning says what is lost, and the torch
code takes over.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

from toolkit.files import cache_folder
from toolkit.log import get_logger

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("packed.cpp", "narrow.cpp", "bits.cpp"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("packed.h", "narrow_avx512.h"))
_FLAGS = ("-O3", "-fno-math-errno", "-fopenmp")
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "packed_adam": [_INT, _INT, _LONG, _POINTER, _POINTER, _INT],
    "packed_sgd": [_INT, _INT, _LONG, _POINTER, _POINTER, _INT, _INT, _INT],
    "narrow_adam": [_INT, _INT, _LONG, _POINTER, _POINTER, _INT, _INT],
    "narrow_sgd": [_INT, _INT, _LONG, _POINTER, _POINTER, _INT, _INT, _INT, _INT],
    "narrow_widen": [_LONG, _POINTER, _POINTER, _POINTER, _INT, _POINTER],
    "narrow_to_nearest": [_LONG, _POINTER, _POINTER, _INT, _POINTER, _POINTER],
    "bits_pack_bits": [_LONG, _POINTER, _POINTER],
    "bits_offsets": [_LONG, _POINTER, _LONG, _POINTER],
    "bits_compress": [_LONG, _POINTER, _POINTER, _POINTER],
    "bits_zero_pruned": [_LONG, _POINTER, _POINTER],
    "bits_thin": [_LONG, _POINTER, _POINTER, _POINTER],
    "bits_histogram": [_LONG, _POINTER, _INT, _INT, ctypes.c_int32, _POINTER],
}


def _build(target: Path) -> None:
    """Compile the sources to `target`, atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    path, talk = os.environ.get("PATH", ""), logging.getLogger("torch.utils.cpp_extension")
    level = talk.level
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), path))  # a virtual environment's ninja
    talk.setLevel(logging.ERROR)  # which CUDA there is and which compiler is not g++ matters to nobody here
    try:
        from torch.utils.cpp_extension import load

        load(
            "packed",
            [str(source) for source in _SOURCES],
            extra_cflags=list(_FLAGS),
            extra_ldflags=["-fopenmp"],
            build_directory=str(own),
            is_python_module=False,
        )
        next(own.glob("packed*.so")).replace(target)  # torch numbers a second build in one process
    finally:
        os.environ["PATH"] = path
        talk.setLevel(level)
        shutil.rmtree(own, ignore_errors=True)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had (said once)."""
    facts = " ".join((*_FLAGS, platform.machine())).encode()  # a home folder may serve several kinds of machine
    key = hashlib.sha256(b"".join(source.read_bytes() for source in (*_HEADERS, *_SOURCES)) + facts).hexdigest()[:16]
    target = cache_folder() / f"packed-{key}.so"
    try:
        if not target.exists():
            _build(target)
        found = ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ImportError, AssertionError, StopIteration) as error:  # setuptools asserts on import
        get_logger().warning(
            "install a C++ compiler and ninja: there is no native update on CPU, and the reference path is several "
            "times slower (%s)",
            textwrap.shorten(str(error) or type(error).__name__, 80, placeholder=" …"),
        )
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    found.bits_offsets.restype = found.bits_histogram.restype = _LONG
    return found


def available() -> bool:
    """Whether the native code could be built or found."""
    return library() is not None
