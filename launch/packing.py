"""Weights with zeros as bit masks and survivors: what `launch.export --packed` writes."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from toolkit.prune.mask import flat_view, mask_bytes, pack_bits, unpack_bits

PACKED = "packed-weights/1"


def pack_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> tensor, or name.mask (bits), name.values (what is not +0) and name.shape where that is smaller."""
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = flat_view(weight.contiguous())
        # By bits: -0.0 is a value of its own, or the way back would not be exact.
        keep = values.view(torch.int32) != 0 if values.dtype is torch.float32 else torch.ones(0, dtype=torch.bool)
        left = int(keep.sum())
        if values.dtype is torch.float32 and 4 * left + mask_bytes(values.numel()) < weight.nbytes:
            packed[f"{name}.mask"] = pack_bits(keep)
            packed[f"{name}.values"] = values[keep]
            packed[f"{name}.shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        else:
            packed[name] = weight.contiguous()
    return packed


def load_packed(path: Path) -> dict[str, Tensor]:
    """The weights of a packed file, bit for bit. Raises ValueError for a file that is none."""
    with safe_open(path, framework="pt") as file:
        if json.loads((file.metadata() or {}).get("adamwprune", "{}")).get("format") != PACKED:
            raise ValueError(f"{path} is not a packed export; load it with timm or safetensors")
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
    weights = {}
    for key, tensor in stored.items():
        name, _, part = key.rpartition(".")
        if part == "mask" and f"{name}.values" in stored:
            weights[name] = _unpacked(tensor, stored[f"{name}.values"], stored.get(f"{name}.shape"), f"{path}: {name}")
        elif not (part in ("values", "shape") and f"{name}.mask" in stored):
            weights[key] = tensor
    return weights


def _unpacked(mask: Tensor, values: Tensor, shape: Tensor | None, what: str) -> Tensor:
    """The dense tensor. Raises ValueError where mask, values and shape, which may be claimed, do not go together."""
    sizes = [] if shape is None else shape.tolist()
    count = math.prod(sizes) if all(isinstance(size, int) and size >= 0 for size in sizes) else -1
    if mask.dtype is not torch.uint8 or count < 0 or mask.shape != (mask_bytes(count),):
        raise ValueError(f"{what} has a mask of {mask.numel()} bytes for the shape {sizes}; export it again")
    keep = unpack_bits(mask, count)
    if values.dtype is not torch.float32 or values.shape != (int(keep.sum()),):
        raise ValueError(f"{what} has other values than its mask says; export it again")
    dense = torch.zeros(sizes)
    dense.view(-1)[keep] = values
    return dense
