"""`python -m launch.readme`: write the table of README.md from results/digits/summary.json and results/bench/optim.json.

Run it after a study or a bench was measured again; a test holds the README to what it writes.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.files import read_json, write_atomically
from toolkit.markdown import table

__all__ = ["main", "with_table"]

ROOT = Path(__file__).parents[1]
_BEGIN, _END = "<!-- the table begins: python -m launch.readme -->\n", "<!-- the table ends -->\n"
# Optimizer and sparsity in the study, row of the bench: each family, what it is compared with first.
_ROWS = (
    ("adamw", 0.0, "torch AdamW fused"),
    ("adamw-magnitude", 0.7, None),
    ("adamwprune", 0.7, "adamwprune 70%"),
    ("adamwprune", 0.9, "adamwprune 90%"),
    ("adamwprune", 0.95, None),
    ("momentum", 0.0, "torch SGD fused"),
    ("sgdprune", 0.7, "sgdprune 70%"),
    ("sgdprune", 0.9, "sgdprune 90%"),
    ("sgdprune", 0.95, None),
)
_HEADER = ("optimizer", "sparsity", "state, peak", "state, end", "step / fused AdamW", "top-1 %", "measured in")


def with_table(readme: str, study: Mapping[str, Any], bench: Mapping[str, Any]) -> str:
    """The README with its table between the two marks made anew. Raises ValueError where a mark is missing."""
    if not 0 <= readme.find(_BEGIN) < readme.find(_END):
        raise ValueError(f"README.md lacks the lines {_BEGIN.strip()} and {_END.strip()}; put them where the table goes")
    before, _, rest = readme.partition(_BEGIN)
    steps = {row["name"]: row for row in bench["rows"]}
    rows = [_row(study, steps, *which) for which in _ROWS]
    made = "\n".join([*table(_HEADER, rows, text=(0, 6)), "", *_notes(study, bench), ""])
    return f"{before}{_BEGIN}{made}{_END}{rest.partition(_END)[2]}"


def _row(study: Mapping[str, Any], steps: Mapping[str, Any], opt: str, sparsity: float, step: str | None) -> list[str]:
    cells = [cell for cell in study["cells"] if cell["opt"] == opt and cell["target_sparsity"] == sparsity]
    if not cells:
        raise ValueError(f"results/digits/summary.json has no run of {opt} at sparsity {sparsity}; run the study again")
    end = statistics.mean(cell["optimizer_bytes_per_weight"] for cell in cells)
    peak = end * max(cell["optimizer_peak_bytes"] for cell in cells) / cells[0]["optimizer_end_bytes"]
    top1 = [cell["final_top1"] for cell in cells]
    measured = f"[digits](results/digits/report.md), {len(cells)} seeds"
    return [
        f"`{opt}`",
        f"{100 * sparsity:g} %" if sparsity else "–",
        f"{peak:.2f}",
        f"{end:.2f}",
        _ratio(steps[step]) if step else "–",
        f"{statistics.mean(top1):.1f} ± {statistics.stdev(top1):.1f}",
        measured + (", [bench](results/bench/optim.md)" if step else ""),
    ]


def _ratio(step: Mapping[str, Any]) -> str:
    """Beside its own family's fused optimizer, which is named where it is SGD."""
    peer = step["peer"] or step["name"]
    return f"{step['ratio_to_peer'] or 1:.2f}" + (" of fused SGD" if "SGD" in peer else "")


def _notes(study: Mapping[str, Any], bench: Mapping[str, Any]) -> Sequence[str]:
    run = study["environment"]
    packed = next(row for row in bench["rows"] if row["name"] == "adamwprune 70%")
    return [
        f"State: bytes a weight that optimizer and pruning keep; on {bench['model']} `adamwprune` ends at "
        f"{packed['state_bytes_per_prunable_weight']:.2f} for 70 %.",
        f"State and top-1: {run['model']}, {run['epochs']} epochs, {run['device']} (CPU); by "
        "`python -m launch.matrix launch/matrices/digits.yaml`.",
        f"Step: {bench['model']}, median of {bench['rounds']} rounds, {bench['device'].removeprefix('CPU: ')} (CPU); by "
        "`python -m launch.bench optim`.",
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the table."""
    argparse.ArgumentParser(prog="python -m launch.readme", description=__doc__).parse_args(argv)
    path = ROOT / "README.md"
    study, bench = (read_json(ROOT / "results" / name) for name in ("digits/summary.json", "bench/optim.json"))
    write_atomically(path, with_table(path.read_text(), study, bench))
    return 0


if __name__ == "__main__":
    sys.exit(main())
