"""The memory tables of a report: what training keeps, what a step's peak is made of, and the study's own column."""

from launch.report.html import as_text
from launch.report.runs import CellRun, Groups, top1
from launch.start import ROOT
from toolkit.files import read_json
from toolkit.markdown import MIB, mib, table

_LEDGER_NOTE = """\
Optimizer state: moments and step counters. Masks and scores: bit masks, offset tables, movement scores.
The peak lies before the pruning ramp, where moments are still dense. With a budget it may come at any step.
The end is what stays from the last mask update on."""
_PEAK_NOTE = """\
Measured: all that was alive at the fullest moment of one probed step a phase, activations and workspace included.
Predicted: before the run, from fake tensors and arithmetic.
With several CPU ranks a step may hold more than predicted: convolutions take another path on one thread.
Where the batch is small the fullest moment lies in the update.
Its copies (torch's own optimizers make some) are not predicted. Every row of every rank is in runs.jsonl.xz."""
_STUDY_NOTE = """\
Mean and peak are taken as the study took them: whole-device use, read once a second over the process's life.
Each reading is cut down to whole MiB. Top-1 per 1,000 MiB divides by the mean.
It counts the allocator's cache and everybody else on the card, so it says little about an optimizer.
It is here because the study ranks by it. Top-1 per MiB of tensors divides by the ledger's peak instead.
*As reported* are the study's own figures for its own task, said to be ImageNet.
By its public code it is CIFAR-100 at 224 px, batch 128, ResNet-50.
Its AdamWPrune row was not pruned (0 % sparsity reached), and what it calls movement is displacement here.
See results/reference. Never compare the two halves."""
_MANY = 8  # methods, above which a step's peak is shown for two phases only
_REPORTED_SPARSITY = 0.7
_REFERENCE = ROOT / "results" / "reference" / "original_study.json"


def study_column(run: CellRun) -> dict[str, float | None]:
    """The original study's figures: whole-device use over rank 0's life in MiB, each reading cut down to whole MiB,
    its mean and peak; accuracy per 1,000 MiB of the mean. None without a GPU.
    """
    record = run.memory["ranks"][0]
    mean, peak = record["device_used_study_mib"], record["device_used_peak_bytes"]
    return {
        "study_mean_mib": mean,
        "study_peak_mib": None if peak is None else peak // MIB,
        "study_top1_per_1000_mib": None if mean is None else run.metrics["final_top1"] / (mean / 1000),
    }


def memory_section(groups: Groups) -> list[str]:
    """The report's lines on memory; of each method the first seed, for bytes do not vary."""
    return [
        "## Memory of the tensors that training keeps (MiB, one rank)",
        "",
        *table(
            [
                "method",
                "optimizer state, end",
                "masks and scores, end",
                "sum, end",
                "bytes per weight, end",
                "state at its peak",
                "all tensors, end",
                "all tensors, peak",
                "all tensors, end, above adamwprune",
            ],
            [
                [
                    name,
                    mib(run.memory["ledger"]["optimizer_bytes"] - run.pruning_bytes),
                    mib(run.pruning_bytes),
                    mib(run.memory["ledger"]["optimizer_bytes"]),
                    f"{run.bytes_per_weight:.3f}",
                    mib(run.peak_state_bytes),
                    mib(run.memory["ledger"]["total_bytes"]),
                    mib(run.memory["ledger_peak"]["total_bytes"]),
                    _above_ours(run, groups),
                ]
                for name, (run, *_) in groups.items()
            ],
        ),
        "",
        _LEDGER_NOTE,
        "",
        "### Who owns it, at the end (MiB)",
        "",
        *_ledger_table(groups),
        "",
        "### A step's peak (MiB, rank 0)",
        "",
        *_peak_table(groups),
        "",
        _PEAK_NOTE,
        "",
        "### Beside the original study",
        "",
        *_study_table(groups),
        "",
        _STUDY_NOTE,
        "",
    ]


def _above_ours(run: CellRun, groups: Groups) -> str:
    """MiB of tensors at the end beyond adamwprune's at the same sparsity; a dense row is set against its lowest."""
    ours = [members[0] for members in groups.values() if members[0].optimizer == "adamwprune" and members[0].sparsity]
    if run.sparsity:
        ours = [own for own in ours if own.sparsity == run.sparsity]
    if not ours:
        return "–"
    base = min(ours, key=lambda own: own.sparsity).memory["ledger"]["total_bytes"]
    return f"{(run.memory['ledger']['total_bytes'] - base) / MIB:+.2f}"


def _ledger_table(groups: Groups) -> list[str]:
    """A line a method, a column a ledger row that any of them fills."""
    filled = {
        name: {row["name"]: row["measured_bytes"] for row in run.memory["ledger"]["rows"] if row["measured_bytes"]}
        for name, (run, *_) in groups.items()
    }
    columns = list(dict.fromkeys(row for rows in filled.values() for row in rows))
    lines = [[name, *(mib(rows.get(c)) for c in columns)] for name, rows in filled.items()]
    return table(["method", *(as_text(column.replace("_", " ")) for column in columns)], lines)


def _peak_table(groups: Groups) -> list[str]:
    keys = ("total_bytes", "predicted_total_bytes", "allocated_peak_bytes", "unexplained_bytes")
    return table(
        ["method", "phase", "measured", "predicted", "allocator's peak", "unexplained"],
        [
            [name, as_text(phase.replace("_", " ")), *(mib(ledger[key]) for key in keys)]
            for name, (run, *_) in groups.items()
            for phase, ledger in run.memory["phases"].items()
            if len(groups) <= _MANY or phase in ("dense", "final")
        ],
    )


def _study_table(groups: Groups) -> list[str]:
    """Ours at the study's sparsity (else all) beside the row that it reports of the same optimizer."""
    reported = {row["optimizer"]: row for row in read_json(_REFERENCE)["rows"]}
    comparable = {
        name: members
        for name, members in groups.items()
        if members[0].sparsity == _REPORTED_SPARSITY and members[0].method in ("movement", "displacement", "state")
    }
    rows = []
    for name, members in (comparable or groups).items():
        run = members[0]
        same = run.sparsity == _REPORTED_SPARSITY and (run.method == "displacement" or run.optimizer == "adamwprune")
        theirs = reported.get({"momentum": "sgd"}.get(run.optimizer, run.optimizer), {}) if same else {}
        accuracy = top1(members)[0]
        cells = [
            *study_column(run).values(),
            accuracy / (run.memory["ledger_peak"]["total_bytes"] / MIB),
            accuracy,
            *map(theirs.get, ("top1", "memory_mean", "memory_peak", "vs_adamwprune", "acc_per_gb")),
        ]
        rows.append([name, *("–" if cell is None else f"{cell:,.2f}" for cell in cells)])
    return table(
        [
            "method",
            "mean MiB",
            "peak MiB",
            "top-1 per 1,000 MiB",
            "top-1 per MiB of tensors",
            "top-1",
            "as reported: top-1",
            "mean MiB",
            "peak MiB",
            "above adamwprune",
            "acc/GB",
        ],
        rows,
    )
