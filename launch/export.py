"""`python -m launch.export RUN --out model.safetensors`: a run's weights for timm, dense or packed.

Dense: what `timm.create_model(..., checkpoint_path=FILE)` loads, pruned weights as zeros. Packed (`--packed`): of each
tensor that has enough zeros a bit mask and the other values, nothing else; `launch.packing.load_packed` gives every
bit back.
Shrunk (`--shrink`): a folder, without the channels that are zero throughout; `toolkit.load_shrunk` reads it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from launch.packing import PACKED, pack_weights
from launch.run_model import run_weights
from toolkit.command import command_parser, one_line_errors
from toolkit.engine.checkpoint import load_state
from toolkit.errors import refuse
from toolkit.files import replacing
from toolkit.markdown import mib


def _refuse_together(packed: bool, shrink: bool, kind: str) -> None:
    refuse(
        {
            "--packed writes bit masks and --shrink removes channels; choose one": packed and shrink,
            f"--packed is a safetensors file; leave it out with --format {kind}": packed and kind != "safetensors",
        }
    )


def export(
    run: Path,
    out: Path,
    *,
    packed: bool = False,
    which: str = "last",
    ema: bool | None = None,
    shrink: bool = False,
    kind: str = "safetensors",
) -> dict[str, Any]:
    """Write the file, or with `shrink` the folder; returns what was done."""
    _refuse_together(packed, shrink, kind)
    source, weights, average = run_weights(run, which, ema)
    if shrink:
        from launch.shrinking import export_shrunk

        return {"average": average, **export_shrunk(source, weights, out, kind)}
    if kind == "safetensors" and load_state(source).get("smaller") is not None:
        raise ValueError(
            f"{run} has gone on with a smaller model (--prune-shrink), which timm has no name for; add --shrink"
        )
    dense_bytes = sum(weight.nbytes for weight in weights.values())
    done: dict[str, Any] = {"file": str(out), "checkpoint": str(source), "average": average, "dense_bytes": dense_bytes}
    if kind != "safetensors":
        from launch.shrinking import export_whole

        done |= export_whole(source, weights, out, kind)
    else:
        content = pack_weights(weights) if packed else weights
        facts = json.dumps({"format": PACKED if packed else "dense", "of": source.name})
        # One key: with several, the order in the file would change from time to time.
        with replacing(out) as temporary:
            save_file(content, temporary, {"adamwprune": facts})
        done["stored_bytes"] = sum(tensor.nbytes for tensor in content.values())
    return {**done, "share": done["stored_bytes"] / dense_bytes}


def _text(done: dict[str, Any]) -> str:
    """What was done, for people."""
    if "channels" in done:
        from launch.shrinking import to_text

        return to_text(done)
    tried = (
        f"; its output differs by {done['difference_of_format']:.1e} on {done['images']}" if "images" in done else ""
    )
    size = f"{mib(done['stored_bytes'])} MiB, {done['share']:.3f} of dense"
    return f"{done['file']}: {size}, from {done['checkpoint']}{tried}"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and export."""
    parser = command_parser(
        "launch.export",
        __doc__,
        {
            "run": {"type": Path, "help": "run folder, or one of its checkpoints"},
            "--out": {"type": Path, "required": True, "help": "file to write; with --shrink a folder"},
            "--packed": {"action": "store_true", "help": "bit masks and survivors instead of zeros"},
            "--shrink": {"action": "store_true", "help": "without the channels that are zero throughout"},
            "--format": {
                "choices": ("safetensors", "onnx", "pt2"),
                "default": "safetensors",
                "help": "default %(default)s; the others hold the model too",
            },
            "--which": {"choices": ("last", "best"), "default": "last", "help": "default %(default)s"},
            "--model-ema": {"action": argparse.BooleanOptionalAction, "help": "the average; the default if kept"},
            "--json": {"action": "store_true", "help": "one JSON object on one line on stdout"},
        },
    )
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        done = export(
            options.run,
            options.out,
            packed=options.packed,
            which=options.which,
            ema=options.model_ema,
            shrink=options.shrink,
            kind=options.format,
        )
    print(json.dumps(done) if options.json else _text(done))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
