"""Which code runs an update: the processor's or GPU's own where there is one, the reference otherwise."""

import importlib.util
from collections.abc import Collection

import torch
from torch import Tensor

from toolkit.kernels.compiled import available

IMPLEMENTATIONS = ("auto", "reference", "native", "triton")

_NEEDS = {
    "native": "float32 parameters (bfloat16 with a dtype for their moments) on CPU and a C++ compiler",
    "triton": "float32 or bfloat16 parameters on a GPU (or TRITON_INTERPRET=1) and the triton package",
}


def choose_implementation(
    asked: str, parameter: Tensor, moment_dtype: torch.dtype, offered: Collection[str], by_chance: bool = False
) -> str:
    """`reference`, or what is `offered` beside it, for one parameter whose moments are of `moment_dtype`.

    `by_chance` says how bfloat16 weights are rounded: native code does not to the nearest. Raises ValueError where an
    implementation is asked for by name and cannot run.
    """
    if asked == "reference":
        return "reference"
    if "native" in offered and asked != "triton" and _native_fits(parameter, moment_dtype, by_chance):
        return "native"
    if "triton" in offered and asked != "native" and _triton_fits(asked, parameter, moment_dtype):
        return "triton"
    if asked != "auto":
        raise ValueError(
            f"implementation={asked} needs {_NEEDS[asked]}, not {parameter.dtype} with {moment_dtype} moments on "
            f"{parameter.device.type}; use implementation=auto"
        )
    return "reference"


def _native_fits(parameter: Tensor, moment_dtype: torch.dtype, by_chance: bool) -> bool:
    fits = parameter.dtype is torch.float32 or (parameter.dtype is torch.bfloat16 and by_chance)
    fits = fits and moment_dtype in (torch.float32, torch.bfloat16, torch.uint8)
    return parameter.device.type == "cpu" and fits and available()


def _triton_fits(asked: str, parameter: Tensor, moment_dtype: torch.dtype) -> bool:
    floats = (torch.float32, torch.bfloat16)
    fits = parameter.dtype in floats and moment_dtype in (*floats, torch.uint8)
    if not fits or importlib.util.find_spec("triton") is None:
        return False
    if parameter.device.type == "cuda":
        return True
    from toolkit.kernels.triton_packed import interpreted

    return asked == "triton" and parameter.device.type == "cpu" and interpreted()
