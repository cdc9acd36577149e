"""Table and picture of `launch.scaling`'s runs."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.markdown import mib, table


def _loss_distance(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """(largest relative difference of strong-scaling losses from those of the fewest ranks, points compared)."""
    strong = [row for row in rows if row["kind"] == "strong"]
    first = dict(strong[0]["loss"])
    far = [abs(loss - first[step]) / first[step] for row in strong[1:] for step, loss in row["loss"]]
    return max(far, default=0.0), len(far)


def to_markdown(result: Mapping[str, Any], command: str) -> str:
    """The report of measured runs."""
    rows = result["rows"]
    no_gpu = (
        "**No figure below is a GPU's.** The ranks share this machine's cores, so more of them bring no speed; what is "
        "shown is that nothing else is lost."
    )
    distance, points = _loss_distance(rows)
    curves = (
        f"**Loss curves** of the same global batch differ by at most {100 * distance:.2g} % over {points} logged "
        "steps (BatchNorm, where a model has it, takes its statistics from a rank's own images)."
    )
    lines = [
        "# Scaling",
        "",
        *([] if rows[0]["on_gpu"] else [no_gpu, ""]),
        f"{result['model']}, {rows[0]['device']}. Made by `{command}`; raw numbers in `scaling.json`.",
        "",
        "![images per second, loss curves](scaling.png)",
        "",
        *_runs_table(rows),
        "",
        "Efficiency is images/s per rank against the fewest ranks'. Strong scaling keeps the global batch, weak the "
        "batch a rank.",
        "",
        *([curves, ""] if points else []),
        "## Our loop against a bare one",
        "",
        *_loops_table(result["loops"]),
        "",
        "Bare: torch's DDP, the same optimizer, loss and loader, no log, no check, no schedule. The loops take turns "
        "on the same epochs of batches in the same processes, where the C library keeps freed memory (else which loop "
        "pays for getting it back is luck); overhead and share are medians over the rounds. "
        "Communication share: what the bare loop saves when its ranks do not talk (`no_sync`); what overlaps with "
        "computing is not in it.",
        "",
    ]
    return "\n".join(lines)


def _runs_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    one = {row["kind"]: row["images_per_sec"] for row in reversed(rows)}
    base = rows[0]["ranks"]
    header = ["scaling", "ranks", "threads a rank", "batch a rank", "global batch", "images/s"]
    header += [f"efficiency against {base}", "waits for data (%)"]
    cells = [
        [
            row["kind"],
            row["ranks"],
            row["threads_per_rank"],
            row["batch_size_per_rank"],
            row["global_batch_size"],
            f"{row['images_per_sec']:.1f}",
            f"{row['images_per_sec'] / one[row['kind']] / (row['ranks'] / base):.2f}",
            f"{row['data_wait_percent']:.1f}",
            "–".join(mib(row["ledger_peak_bytes"][end], 1) for end in ("min", "max")),
        ]
        for row in rows
    ]
    return table([*header, "memory a rank at a step's peak (MiB, ledger, lowest–highest rank)"], cells)


def _loops_table(loops: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["ranks", "steps an epoch", "ours (s an epoch)", "bare (s)", "overhead", "by round", "communication share"]
    cells = [
        [
            loop["ranks"],
            loop["steps"],
            *(f"{statistics.median(loop['epoch_s'][name]):.3f}" for name in ("ours", "bare")),
            f"{100 * loop['overhead']:+.1f} %",
            ", ".join(f"{100 * x:+.1f}" for x in loop["overhead_rounds"]),
            "–" if loop["communication_share"] is None else f"{100 * loop['communication_share']:.1f} %",
        ]
        for loop in loops
    ]
    return table(header, cells, text=())


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Images per second over ranks, and the loss curves of one global batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = result["rows"]
    for kind, style, colour in (("strong", "o-", "#0072B2"), ("weak", "s--", "#D55E00")):
        mine = [row for row in rows if row["kind"] == kind]
        left.plot([r["ranks"] for r in mine], [r["images_per_sec"] for r in mine], style, color=colour, label=kind)
    left.set(
        xlabel="ranks",
        ylabel="images/s",
        ylim=(0, 1.15 * max(row["images_per_sec"] for row in rows)),
        xticks=sorted({row["ranks"] for row in rows}),
    )
    left.legend(title="scaling", frameon=False, loc="lower center")
    strong = [row for row in rows if row["kind"] == "strong"]
    looks = zip(("-", "--", ":", "-."), (3.5, 1.5, 1.5, 1.5), ("#56B4E9", "#000000", "#D55E00", "#009E73"), strict=True)
    for row, (style, width, colour) in zip(strong, looks, strict=False):
        label = f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
        right.plot(*zip(*row["loss"], strict=True), style, linewidth=width, color=colour, label=label)
    highest = max(loss for row in strong for _, loss in row["loss"])
    right.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, 1.1 * highest))
    right.legend(title=f"global batch {strong[0]['global_batch_size']}", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    where = rows[0]["device"] if rows[0]["on_gpu"] else f"NO GPU: {rows[0]['device']}, which the ranks share"
    figure.suptitle(f"{result['model']} on 1 and more ranks ({where})", fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
