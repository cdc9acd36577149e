"""`python -m launch.readme`: write README.md's table from the photo studies, the optimizers' bench, and results/gpu.

Run it after a study or a bench was measured again; a test holds the README to what it writes.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch.start import ROOT
from toolkit.command import command_parser, one_line_errors
from toolkit.files import read_json, write_atomically
from toolkit.markdown import table

_BEGIN, _END = "<!-- the table begins: python -m launch.readme -->\n", "<!-- the table ends -->\n"
# The first one says the bytes.
_STUDIES = ("results/cifar10", "results/imagenette")
# Cell of the studies with its tuned setting, row of the bench: each family, what it is compared with first.
_ROWS = (
    ("adamw_none", "torch AdamW fused"),
    ("adamw_magnitude_70_prune-scope=erk", None),
    ("adamw_magnitude_90_prune-scope=erk", None),
    ("adamwprune_state_70_prune-end=0.75_state-budget=auto", "adamwprune 70%"),
    ("adamwprune_state_90_prune-end=0.75_state-budget=auto", "adamwprune 90%"),
    ("momentum_none", "torch SGD fused"),
    ("momentum_magnitude_90", None),
    ("sgdprune_state_70_state-budget=auto", "sgdprune 70%"),
    ("sgdprune_state_90_state-budget=auto", "sgdprune 90%"),
)
_HEADER = (
    "optimizer",
    "sparsity",
    "state, peak",
    "state, end",
    "[step](results/bench/optim.md) / fused AdamW",
    "top-1 %, [CIFAR-10](results/cifar10/README.md)",
    "top-1 %, [Imagenette](results/imagenette/README.md)",
    "[the step on a GPU](results/gpu/README.md)",
)


def gpu_checks() -> list[dict[str, Any]]:
    """The results of `launch.gpu_check` that are kept; none until a GPU was at hand."""
    found = [read_json(path) for path in sorted((ROOT / "results" / "gpu").glob("*.json"))]
    return [check for check in found if check["schema"] == "gpu-check/2"]


def with_table(
    readme: str,
    studies: Sequence[Mapping[str, Any]],
    bench: Mapping[str, Any],
    checks: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The README with its table between the two marks made anew; `checks` fill its GPU column, a figure each.

    Raises ValueError where a mark or a row is missing.
    """
    if not 0 <= readme.find(_BEGIN) < readme.find(_END):
        raise ValueError(f"README.md lacks {_BEGIN.strip()} and {_END.strip()}; put them where the table goes")
    before, _, rest = readme.partition(_BEGIN)
    model = bench["machines"][-1]["model"]
    timed = [times for check in checks for times in _device_times(check, model)]
    rows = [_row(studies, bench, timed, *which) for which in _ROWS]
    made = "\n".join([*table(_HEADER, rows, text=(0,)), "", *_notes(studies[0], bench, timed), ""])
    return f"{before}{_BEGIN}{made}{_END}{rest.partition(_END)[2]}"


def _device_times(check: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    """What `launch.bench device` said of a model on that GPU."""
    results = [part["result"] or {} for part in check["parts"].values()]
    wanted = {"schema": "bench-device/1", "model": model, "kind": "cuda"}
    return [result for result in results if wanted.items() <= result.items()]


def _row(
    studies: Sequence[Mapping[str, Any]],
    bench: Mapping[str, Any],
    timed: Sequence[Mapping[str, Any]],
    name: str,
    step: str | None,
) -> list[str]:
    of_study = []
    for folder, study in zip(_STUDIES, studies, strict=True):
        of_study.append([one for one in study["cells"] if one["name"] == f"{one['model']}_{name}_seed{one['seed']}"])
        if not of_study[-1]:
            raise ValueError(f"{folder}/summary.json has no run of {name}; run the study again")
    first = of_study[0][0]  # bytes are the same for every seed
    end, sparsity = first["optimizer_bytes_per_weight"], first["target_sparsity"]
    top1 = [[cell["final_top1"] for cell in cells] for cells in of_study]
    return [
        f"`{first['opt']}`",
        f"{100 * sparsity:g} %" if sparsity else "–",
        f"{end * first['optimizer_peak_bytes'] / first['optimizer_end_bytes']:.2f}",
        f"{end:.2f}",
        _ratios(_steps(bench, step)) if step else "–",
        *(f"{statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f}" for seeds in top1),
        _ratios([row for one in timed for row in one["rows"] if row["name"] == step]) if step and timed else "–",
    ]


def _steps(bench: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The row of each machine."""
    found = [row for machine in bench["machines"] for row in machine["rows"] if row["name"] == name]
    if len(found) < len(bench["machines"]):
        raise ValueError(f"results/bench/optim.json has no row {name!r}; run launch.bench optim again")
    return found


def _ratios(steps: Sequence[Mapping[str, Any]]) -> str:
    """Beside its own family's fused optimizer, which is named where it is SGD; from the best to the worst machine."""
    peer = steps[0]["peer"] or steps[0]["name"]
    figures = sorted({f"{step['ratio_to_peer']:.2f}" for step in steps if step["peer"]}) or ["1.00"]
    return " to ".join(dict.fromkeys((figures[0], figures[-1]))) + (" of fused SGD" if "SGD" in peer else "")


def _notes(study: Mapping[str, Any], bench: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> list[str]:
    run, machines, model = study["environment"], bench["machines"], bench["machines"][-1]["model"]
    end = _steps(bench, "adamwprune 70%")[-1]["state_bytes_per_prunable_weight"]
    trained = f"{run['device']} ({run['device_type'].upper()})"
    on_gpu = f"{' and '.join(one['device'] for one in timed)}, device time" if timed else "not measured yet"
    return [
        f"State: bytes a weight that optimizer and pruning keep; on {model} `adamwprune` ends at {end:.2f} for 70 %.",
        f"State and top-1: {run['model']} with a quarter of its channels, {run['epochs']} epochs, {trained}. "
        "10,000 photographs of CIFAR-10 (5 seeds), 9,469 of Imagenette (3); by `python -m launch.matrix` of "
        "`launch/matrices/cifar10.yaml`, `imagenette.yaml`, and the same with `-tuned`. "
        "Settings were tuned on CIFAR-10 at 90 %, 15 variants a method; none on Imagenette.",
        f"Step: {model}, float32 moments, medians; by `python -m launch.bench optim --out results/bench`. "
        f"From the best to the worst of {len(machines)} CPUs. On a GPU: {on_gpu}.",
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the table."""
    parser = command_parser("launch.readme", __doc__, {})
    parser.parse_args(argv)
    path = ROOT / "README.md"
    with one_line_errors(parser):
        studies = [read_json(ROOT / folder / "summary.json") for folder in _STUDIES]
        bench = read_json(ROOT / "results/bench/optim.json")
        write_atomically(path, with_table(path.read_text(), studies, bench, gpu_checks()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
