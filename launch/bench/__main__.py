"""`python -m launch.bench`: what the toolkit's claims of speed and exactness rest on, measured here."""

import importlib
import json
import sys
from pathlib import Path

from toolkit.command import command_parser, one_line_errors, spelled
from toolkit.files import read_json, write_result

# What is measured, by a function bench_<what> of launch.bench.<what>, and the flags it is given.
_NEEDS = {
    "optim": ("model", "rounds", "only_bars"),
    "device": ("model", "rounds"),
    "facts": (),
    "equivalence": ("model", "steps"),
    "data": ("rounds",),
    "memory": ("model", "batch_size"),
    "kernels": (),
    "shrunk": ("model", "rounds", "batch_size", "malloc"),
    "inference": ("run", "models", "rounds", "batches", "engines", "threads", "channel_multiple", "malloc"),
}


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and measure."""
    parser = command_parser(
        "launch.bench",
        __doc__,
        {
            "what": {"choices": tuple(_NEEDS), "help": "what to measure"},
            "run": {"type": Path, "nargs": "*", "help": "of inference: run folders, which add rows"},
            "--model": {"default": "resnet50", "help": "timm model whose shapes are used (default %(default)s)"},
            "--rounds": {"type": int, "default": 15, "help": "of all but equivalence and memory, default %(default)s"},
            "--steps": {"type": int, "default": 200, "help": "of equivalence, default %(default)s"},
            "--batch-size": {"type": int, "default": 8, "help": "of memory and shrunk, default %(default)s"},
            "--models": {
                "nargs": "*",
                "default": ["resnet50", "vit_small_patch16_224"],
                "help": "of inference, with random weights, default %(default)s",
            },
            "--batches": {"type": int, "nargs": "+", "default": [1, 32], "help": "of inference, default %(default)s"},
            "--engines": {
                "nargs": "+",
                "default": ["eager", "compile", "onnx"],
                "help": "of inference, on the CPU, default %(default)s",
            },
            "--threads": {"type": int, "default": 2, "help": "of inference, default %(default)s"},
            "--channel-multiple": {
                "type": int,
                "default": 1,
                "help": "of inference: rows whose widths are the nearest multiples of this too, for example 16",
            },
            "--malloc": {
                "choices": ("keep", "system"),
                "default": "keep",
                "help": "of inference and shrunk: keep freed memory for the next tensor, or give it back as glibc does",
            },
            "--only-bars": {
                "action": "store_true",
                "help": "of optim: rows with a bar, and their peers: for a model whose rows do not all fit",
            },
            "--json": {"action": "store_true", "help": "one JSON object on one line on stdout"},
            "--out": {"type": Path, "help": "folder for the .json and .md files, for example results/bench"},
        },
    )
    options = parser.parse_args(argv)
    if options.run and options.what != "inference":
        parser.error(f"{options.what} takes no run folders ({options.run[0]}); inference does")
    bench = importlib.import_module(f"launch.bench.{options.what}")
    with one_line_errors(parser):
        result = getattr(bench, f"bench_{options.what}")(*(getattr(options, name) for name in _NEEDS[options.what]))
    by_model = options.what in ("equivalence", "device") or (options.what == "optim" and options.model != "resnet50")
    name = f"{options.what}-{options.model}" if by_model else options.what
    if options.what == "optim":
        kept = options.out and options.out / f"{name}.json"
        result = bench.with_other_machines(result, read_json(kept) if kept and kept.is_file() else {})
    text = bench.to_markdown(result, spelled("launch.bench", argv))
    if options.out:
        write_result(options.out, name, result, text)
    print(json.dumps(result) if options.json else text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
