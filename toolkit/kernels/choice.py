"""Which code runs an update: the processor's or GPU's own where there is one, the reference otherwise."""

import torch
from torch import Tensor

from toolkit.kernels.compiled import available

__all__ = ["IMPLEMENTATIONS", "choose_implementation"]

IMPLEMENTATIONS = ("auto", "reference", "native")


def choose_implementation(asked: str, parameter: Tensor, plain_state: bool) -> str:
    """`reference` or `native` for one parameter; `plain_state` says that its moments are float32.

    Raises ValueError where an implementation is asked for by name and cannot run.
    """
    if asked == "reference":
        return "reference"
    fits = parameter.device.type == "cpu" and parameter.dtype is torch.float32 and plain_state
    if fits and available():
        return "native"
    if asked == "native":
        raise ValueError(
            f"implementation=native runs float32 parameters and moments on CPU, not {parameter.dtype} on "
            f"{parameter.device.type}, and needs a C++ compiler; use implementation=auto"
        )
    return "reference"
