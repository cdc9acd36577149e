"""2:4 weights as torch's semi-structured tensors, which the tensor cores of some GPUs multiply faster."""

import torch
from torch import Tensor, nn

# Smallest shapes and multiples that torch's kernels take, by element size: rows, columns.
_HALF = (torch.float16, torch.bfloat16)
_MULTIPLES = (32, 64)


def to_semi_structured(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Turn the `nn.Linear` weights of a model that have two zeros in each four into semi-structured tensors, in place.

    For inference; the model must be on its device and in its dtype. Returns (names of the weights that were turned,
    {name: why not} of the other linear weights).
    """
    turned: list[str] = []
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            reason = _why_not(weight)
            if reason is None:
                try:
                    held = torch.sparse.to_sparse_semi_structured(weight)
                    nn.functional.linear(weight.new_zeros(_MULTIPLES[1], layer.in_features), held)
                    layer.weight = nn.Parameter(held, requires_grad=False)
                except (RuntimeError, NotImplementedError) as error:  # a device without the kernels
                    reason = str(error).splitlines()[0]
            if reason is None:
                turned.append(f"{name}.weight")
            else:
                left[f"{name}.weight"] = reason
    return turned, left


def _why_not(weight: Tensor) -> str | None:
    """Why torch cannot hold a weight [rows, columns] semi-structured; None where it can."""
    rows, columns = weight.shape
    if weight.device.type != "cuda":
        return f"it is on {weight.device.type}; the kernels are for CUDA"
    if weight.dtype not in _HALF:
        return f"it is {str(weight.dtype).removeprefix('torch.')}; the kernels take float16 and bfloat16"
    if rows % _MULTIPLES[0] or columns % _MULTIPLES[1]:
        return f"its shape {rows} × {columns} is no multiple of {_MULTIPLES[0]} × {_MULTIPLES[1]}"
    if int(weight.view(rows, -1, 4).ne(0).sum(2).max()) > 2:
        return "it has more than 2 of 4 neighbours; prune it with --prune-pattern 2:4"
    return None
