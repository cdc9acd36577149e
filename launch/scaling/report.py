"""Tables and picture of `launch.scaling`: the runs, and what goes between the ranks as formulas beside counts."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.scaling.collectives import WHAT, Traffic, formulas, log_line_bytes, wire_bytes
from toolkit.markdown import mib, page, table

_NO_GPU = """\
**No figure below is a GPU's.** The ranks share this machine's cores, so more of them bring no speed; what is \
shown is that nothing else is lost."""
_FAR = (8, 64, 1024)
# In the order of WHAT.
_FORMULA = {
    "ddp": ("4 P", "–", "B", "8", "16"),
    "fsdp2": ("W(N)", "(2 W(N) − K(N)) / N", "–", "8", "40,984 + 40 S"),
    "zero1": ("4 P", "Σ over groups of 8 ⌈P_g / 2N⌉", "–", "16", "41,000 + 24 S"),
    "zero2": ("4 P", "Σ over groups of 8 ⌈P_g / 2N⌉", "–", "16", "41,000 + 24 S"),
    "zero3": ("Σ over tensors of 4 N ⌈p / N⌉", "Σ over tensors of 4 ⌈p / N⌉", "–", "24", "41,000 + 24 S"),
}


def _loss_distance(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """(largest relative difference of strong-scaling losses from those of the fewest ranks, points compared)."""
    strong = [row for row in rows if row["kind"] == "strong"]
    first = dict(strong[0]["loss"])
    far = [abs(loss - first[step]) / first[step] for row in strong[1:] for step, loss in row["loss"]]
    return max(far, default=0.0), len(far)


def to_markdown(result: Mapping[str, Any], command: str) -> str:
    """The report of measured runs."""
    rows = result["rows"]
    distance, points = _loss_distance(rows)
    curves = (
        f"**Loss curves** of the same global batch differ by at most {100 * distance:.2g} % over {points} logged "
        "steps (BatchNorm, where a model has it, takes its statistics from a rank's own images)."
    )
    return page(
        "# Scaling",
        "",
        *([] if rows[0]["on_gpu"] else [_NO_GPU, ""]),
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
    )


def _runs_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    one = {row["kind"]: row["images_per_sec"] for row in reversed(rows)}
    base = rows[0]["ranks"]
    header = ["scaling", "ranks", "threads a rank", "batch a rank", "global batch", "images/s"]
    header += [f"efficiency against {base}", "waits for data (%)"]
    return table(
        [*header, "memory a rank at a step's peak (MiB, ledger, lowest–highest rank)"],
        [
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
        ],
    )


def _loops_table(loops: Sequence[Mapping[str, Any]]) -> list[str]:
    return table(
        ["ranks", "steps an epoch", "ours (s an epoch)", "bare (s)", "overhead", "by round", "communication share"],
        [
            [
                loop["ranks"],
                loop["steps"],
                *(f"{statistics.median(loop['epoch_s'][name]):.3f}" for name in ("ours", "bare")),
                f"{100 * loop['overhead']:+.1f} %",
                ", ".join(f"{100 * x:+.1f}" for x in loop["overhead_rounds"]),
                "–" if loop["communication_share"] is None else f"{100 * loop['communication_share']:.1f} %",
            ]
            for loop in loops
        ],
        text=(),
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Images per second over ranks, and the loss curves of one global batch."""
    from matplotlib.figure import Figure

    from launch.png import save_png

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
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
        right.plot(
            *zip(*row["loss"], strict=True),
            style,
            linewidth=width,
            color=colour,
            label=f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}",
        )
    highest = max(loss for row in strong for _, loss in row["loss"])
    right.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, 1.1 * highest))
    right.legend(title=f"global batch {strong[0]['global_batch_size']}", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    where = rows[0]["device"] if rows[0]["on_gpu"] else f"NO GPU: {rows[0]['device']}, which the ranks share"
    figure.suptitle(f"{result['model']} on 1 and more ranks ({where})", fontsize=10)
    save_png(figure, path)


def _traffic(counts: Mapping[str, Any], engine: str) -> Traffic:
    return Traffic(**counts["facts"]["fsdp2" if engine == "fsdp2" else "ddp"])


def _counted_rows(counts: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for engine, terms in _FORMULA.items():
        for what, term in zip(WHAT, terms, strict=True):
            wanted = [formulas(engine, _traffic(counts, engine), ranks)[what] for ranks in (2, 3)]
            found = [counts["counted"][f"{engine}-{ranks}"][what] for ranks in (2, 3)]
            if not any(wanted) and not any(row["bytes"] for row in found):
                continue
            cells: list[object] = [engine, what, term]
            for size, row in zip(wanted, found, strict=True):
                same = "" if size == row["bytes"] else " (DIFFERS)"
                cells += [f"{size:,}", f"{row['bytes']:,}{same}", row["collectives"]]
            rows.append(cells)
    return rows


def _far_rows(counts: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for engine in _FORMULA:
        facts = _traffic(counts, engine)
        for ranks in _FAR:
            payload = formulas(engine, facts, ranks)
            reduce = "reduce_scatter" if engine in ("fsdp2", "zero3") else "all_reduce"
            sent = wire_bytes(reduce, payload["gradients"], ranks) + wire_bytes("all_gather", payload["weights"], ranks)
            gathered = 2 * 8 * facts.prunable * ranks if engine != "ddp" else 0
            sizes = (payload["buffers"], payload["mask update"], gathered, log_line_bytes(ranks))
            rows.append([engine, ranks, mib(sent, 1), *(f"{size:,}" for size in sizes)])
    return rows


def model_to_markdown(result: Mapping[str, Any], command: str) -> str:
    """What grows with the number of ranks: formulas, checked by counting, and evaluated far out."""
    counts = result["collectives"]
    facts = _traffic(counts, "ddp")
    columns = ["engine", "what", "formula"]
    for ranks in (2, 3):
        columns += [f"formula, {ranks} ranks", "counted", "collectives"]
    far = ["engine", "ranks", "gradients and weights sent (MiB a step)", "buffers (bytes a step)"]
    far += ["mask update (payload, bytes)", "mask update: gathered (bytes)", "log line (payload, bytes)"]
    return page(
        "# What goes between the ranks",
        "",
        f"{counts['model']}: P = {facts.weights_bytes // 4:,} parameters in {len(facts.shapes)} tensors, S = "
        f"{facts.prunable} of them prunable, B = {facts.float_buffer_bytes + facts.int_buffer_bytes:,} bytes of "
        "buffers; float32; AdamWPrune. Counted by torch's profiler on gloo ranks on CPU "
        f"(`{command}`; `tests/distributed/test_collectives.py` holds two more models to the same formulas). There are "
        "bytes and collectives here and no times: none was measured on GPUs.",
        "",
        "## Payload of one rank, in bytes",
        "",
        "N ranks; W(N) = bytes of the weights with the first dimension of each padded to a multiple of N; K(N) = the "
        "same of what FSDP2 gathers once a step instead of twice (the outermost unit, the last one); P_g = elements "
        "of an optimizer group; p = elements of a tensor. Gradients, weights, buffers and control are of every step, "
        "a mask update comes on top every `--prune-frequency` steps of the ramp.",
        "",
        *table(columns, _counted_rows(counts), text=range(3)),
        "",
        "The number of collectives does not depend on N. A mask update of FSDP2 and ZeRO takes more rounds where a "
        "layer would lose its last weight (none did here). DDP has its masks compared, 16 bytes; its weights and "
        "moments are whole on every rank, so choosing needs no talk. Gloo has no reduce-scatter, so FSDP2's gradients "
        "and ZeRO-3's go by all-reduce here.",
        "",
        "## Evaluated",
        "",
        "Sent by one rank in a step with ring collectives: all-reduce sends 2 (N−1)/N of its payload, reduce-scatter "
        "(N−1)/N, all-gather N−1 shares. Gradients go by all-reduce with DDP and ZeRO-1/2, as counted, and by "
        "reduce-scatter with FSDP2 and ZeRO-3, as on NCCL/RCCL. Buffers are DDP's broadcast from rank 0.",
        "",
        *table(far, _far_rows(counts)),
        "",
        "What grows without bound with N: the gathered tie counts of a mask update (16 S bytes a rank) and the log "
        "line (40 bytes a rank). FSDP2 pads: a bias of 64 becomes 1,024 rows at "
        "1,024 ranks, so a model of small tensors sends more there than DDP would.",
    )
