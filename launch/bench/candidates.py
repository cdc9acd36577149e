"""Optimizers to be measured: each with random weights and gradients of a model's shapes, and state of its own."""

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from launch.bench.timing import DEVICE, transient_bytes
from toolkit.command import say
from toolkit.kernels import native

ADAM, SGD = "torch AdamW fused", "torch SGD fused"
Maker = tuple[str, Callable[..., Any], str, float | None, str | None]  # name, constructor, peer, limit, instructions


def random_gradients(shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Gradients of these shapes, which several candidates may share."""
    return [torch.randn(shape, device=DEVICE) * 0.01 for shape in shapes]


def with_gradients(gradients: Sequence[Tensor]) -> list[nn.Parameter]:
    """Random parameters that have these gradients."""
    made = [nn.Parameter(torch.randn_like(gradient) * 0.05) for gradient in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = gradient
    return made


@contextlib.contextmanager
def only(isa: str | None) -> Iterator[None]:
    """Native code restricted to one instruction set; None leaves the choice to the processor."""
    with unittest.mock.patch.object(native, "best_isa", return_value=isa) if isa else contextlib.nullcontext():
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors of a state entry: of a quantized one its codes and scales."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def _bytes(optimizer: Any, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of all state of these parameters; a storage shared by several counts once."""
    states = (optimizer.state.get(parameter, {}) for parameter in parameters)
    tensors = [tensor for state in states for value in state.values() for tensor in _tensors(value)]
    # A counter is one of many in its storage: its own bytes.
    sizes = {t.data_ptr(): t.nbytes if t.ndim == 0 else t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def candidates(
    shapes: Sequence[torch.Size], count: int, makers: Sequence[Maker]
) -> list[tuple[Callable[[], Any], dict[str, Any]]]:
    """(how to step it, its row without the times) of each maker, with parameters of these shapes.

    `count` is the number of prunable weights. One that fails is left out and it is said.
    """
    torch.manual_seed(0)
    gradients = random_gradients(shapes)
    found = []
    for name, make, peer, limit, isa in makers:
        say(f"preparing {name}")
        parameters = with_gradients(gradients)
        try:
            optimizer = make(parameters)
            for _ in range(3):  # state, masks, and what is compiled at the first packed step
                optimizer.step()
        except Exception as error:  # other people's code may fail to build in any way; it is said
            if not name.startswith(("torchao", "DeepSpeed")):
                raise
            say(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        row = {
            "name": name,
            "step_ms": None,
            "peer": peer or None,
            "ratio_to_peer": None,
            "limit": limit,
            "met": None,
            "share_of_in_place_rate": None,
            "state_bytes_per_prunable_weight": _bytes(optimizer, [p for p in parameters if p.ndim > 1]) / count,
            "other_state_bytes_per_prunable_weight": _bytes(optimizer, [p for p in parameters if p.ndim <= 1]) / count,
            "transient_bytes": transient_bytes(optimizer.step),  # beyond what the step leaves
        }
        found.append((only(isa)(optimizer.step) if isa else optimizer.step, row))
    return found


def step_bytes(row: Mapping[str, Any]) -> float:
    """Bytes a weight that a step must move: weight and moments read and written, gradient and mask read."""
    masked = row["name"].startswith(("adamwprune", "sgdprune")) and " 0%" not in row["name"]
    mask = 0.125 if masked else 0.0
    return 12.0 + 2 * row["state_bytes_per_prunable_weight"] - mask
