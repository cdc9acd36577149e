"""`python -m launch.bench`: what the toolkit's claims of speed and exactness rest on, measured here."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """(result, the function that writes it as Markdown)"""
    if options.what == "optim":
        from launch.bench.optim import bench_optim, to_markdown

        return bench_optim(options.model, options.rounds, _log), to_markdown
    if options.what == "data":
        from launch.bench.data import bench_data, to_markdown

        return bench_data(options.rounds, _log), to_markdown
    if options.what == "memory":
        from launch.bench.memory import bench_memory, to_markdown

        return bench_memory(options.model, options.batch_size, 224, _log), to_markdown
    from launch.bench.equivalence import bench_equivalence, to_markdown

    return bench_equivalence(options.model, options.steps, _log), to_markdown


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__)
    parser.add_argument("what", choices=("optim", "equivalence", "data", "memory"), help="what to measure")
    parser.add_argument("--model", default="resnet50", help="timm model whose shapes are used (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of optim and data, default %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="of equivalence, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="of memory, default %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line on stdout")
    parser.add_argument("--out", type=Path, help="folder for the .json and .md files, for example results/bench")
    options = parser.parse_args(argv)
    result, to_markdown = _measure(options)
    arguments = sys.argv[1:] if argv is None else argv
    text = to_markdown(result, shlex.join(["python", "-m", "launch.bench", *arguments]))
    if options.out:
        name = f"{options.what}-{options.model}" if options.what == "equivalence" else options.what
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / f"{name}.md").write_text(text)
    print(json.dumps(result) if options.json else text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
