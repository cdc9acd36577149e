"""`python -m launch.scaling --config_file FILE --ranks 1 2 -- <train flags>`: what more ranks bring and cost.

Strong scaling keeps the global batch of the flags, weak scaling the batch a rank has at the most ranks. Every row is a
real run under `accelerate launch`; the loop's overhead is measured against a bare one in the same processes, and what
goes between the ranks is counted and set beside its formulas.
"""

import sys
from pathlib import Path

from launch.scaling.measure import measure_scaling
from launch.scaling.report import draw, model_to_markdown, to_markdown
from toolkit.cli import parse
from toolkit.command import command_parser, one_line_errors, spelled
from toolkit.files import write_atomically, write_json


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, measure, write the report."""
    parser = command_parser(
        "launch.scaling",
        __doc__,
        {
            "--config_file": {"type": Path, "required": True, "help": "of accelerate_configs/"},
            "--ranks": {"type": int, "nargs": "+", "default": [1, 2], "help": "default %(default)s"},
            "--runs": {"type": Path, "default": Path("runs/scaling"), "help": "default %(default)s"},
            "--out": {"type": Path, "default": Path("runs/scaling"), "help": "default %(default)s"},
            "--count-model": {"default": "resnet50", "help": "whose collectives are counted, default %(default)s"},
        },
    )
    arguments = sys.argv[1:] if argv is None else argv
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = parser.parse_args(own)
    flags = arguments[len(own) + 1 :]
    file, runs = options.config_file.resolve(), options.runs.resolve()
    config = parse(flags)
    if config.mixes or config.kd_model_name:
        parser.error("--mixup, --cutmix and --kd-model-name: the bare loop has labels alone; leave them out")
    with one_line_errors(parser, f"the same command goes on with the runs that are in {runs}"):
        result = measure_scaling(file, sorted(options.ranks), flags, runs, options.count_model)
    command = spelled("launch.scaling", argv)
    write_json(options.out / "scaling.json", result)
    write_atomically(options.out / "report.md", to_markdown(result, command))
    write_atomically(options.out / "model.md", model_to_markdown(result, command))
    draw(result, options.out / "scaling.png")
    print(to_markdown(result, command))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
