"""`python -m launch.export RUN --out model.safetensors`: a run's weights for timm, dense or packed.

Dense: what `timm.create_model(..., checkpoint_path=FILE)` loads, pruned weights as zeros. Packed (`--packed`): of each
tensor that has enough zeros a bit mask and the other values, nothing else; `load_packed` gives every bit back.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.command import command_parser, one_line_errors
from toolkit.engine.checkpoint import best_checkpoint, complete_checkpoints, load_checkpoint, newest_checkpoint
from toolkit.files import replacing
from toolkit.markdown import mib
from toolkit.prune.mask import flat_view, mask_bytes, pack_bits, unpack_bits

_FORMAT = "packed-weights/1"


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
        if json.loads((file.metadata() or {}).get("adamwprune", "{}")).get("format") != _FORMAT:
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


def _checkpoint_of(run: Path, which: str) -> Path:
    """The checkpoint folder that is meant. Raises ValueError where there is none."""
    if (run / "COMPLETE").is_file():
        return run
    folder = run / "checkpoints"
    found = best_checkpoint(folder) if which == "best" else newest_checkpoint(folder)
    if found is None:
        names = ", ".join(path.name for path in complete_checkpoints(folder)) or "none"
        raise ValueError(f"{run} has no {which} checkpoint (complete ones: {names}); give a run folder")
    return found


def export(run: Path, out: Path, *, packed: bool, which: str, ema: bool | None) -> dict[str, Any]:
    """Write the file; returns what was done."""
    source = _checkpoint_of(run, which)
    state = load_checkpoint(source)
    if ema and state["ema"] is None:
        raise ValueError(f"{run} kept no average of its weights; leave out --model-ema")
    average = state["ema"] is not None and ema is not False
    weights: dict[str, Tensor] = {
        key: value.contiguous() for key, value in state["ema" if average else "model"].items()
    }
    dense_bytes = sum(weight.nbytes for weight in weights.values())
    content = pack_weights(weights) if packed else weights
    facts = json.dumps({"format": _FORMAT if packed else "dense", "of": source.name})
    # One key: with several, the order in the file would change from time to time.
    with replacing(out) as temporary:
        save_file(content, temporary, {"adamwprune": facts})
    stored = sum(tensor.nbytes for tensor in content.values())
    return {
        "file": str(out),
        "checkpoint": str(source),
        "average": average,
        "dense_bytes": dense_bytes,
        "stored_bytes": stored,
        "share": stored / dense_bytes,
    }


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and export."""
    parser = command_parser(
        "launch.export",
        __doc__,
        {
            "run": {"type": Path, "help": "run folder, or one of its checkpoints"},
            "--out": {"type": Path, "required": True, "help": "file to write, for example model.safetensors"},
            "--packed": {"action": "store_true", "help": "bit masks and survivors instead of zeros"},
            "--which": {"choices": ("last", "best"), "default": "last", "help": "default %(default)s"},
            "--model-ema": {"action": argparse.BooleanOptionalAction, "help": "the average; the default if kept"},
            "--json": {"action": "store_true", "help": "one JSON object on one line on stdout"},
        },
    )
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        done = export(options.run, options.out, packed=options.packed, which=options.which, ema=options.model_ema)
    size = f"{mib(done['stored_bytes'])} MiB, {done['share']:.3f} of dense"
    print(json.dumps(done) if options.json else f"{done['file']}: {size}, from {done['checkpoint']}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
