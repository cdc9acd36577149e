"""Tables and picture of `launch.scaling`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.scaling.collectives import WHAT, Traffic, formulas, log_line_bytes, wire_bytes

__all__ = ["draw", "model_to_markdown", "to_markdown"]

MIB = 2**20
_FAR = (8, 64, 1024)
_FORMULA = {
    "ddp": {
        "gradients": "4 P",
        "weights": "–",
        "buffers": "B",
        "control": "8",
        "mask update": "16",
    },
    "fsdp2": {
        "gradients": "W(N)",
        "weights": "(2 W(N) − K(N)) / N",
        "buffers": "–",
        "control": "8",
        "mask update": "40,984 + 40 S",
    },
    "zero1": {
        "gradients": "4 P",
        "weights": "Σ over groups of 8 ⌈P_g / 2N⌉",
        "buffers": "–",
        "control": "16",
        "mask update": "41,000 + 24 S",
    },
    "zero3": {
        "gradients": "Σ over tensors of 4 N ⌈p / N⌉",
        "weights": "Σ over tensors of 4 ⌈p / N⌉",
        "buffers": "–",
        "control": "24",
        "mask update": "41,000 + 24 S",
    },
}
_FORMULA["zero2"] = _FORMULA["zero1"]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> list[str]:
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return [f"| {' | '.join(str(cell) for cell in row)} |" for row in (head, rule, *rows)]


def _loss_distance(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """(largest relative difference of strong-scaling losses from those of the fewest ranks, points compared)."""
    strong = [row for row in rows if row["kind"] == "strong"]
    first = dict(strong[0]["loss"])
    far = [abs(loss - first[step]) / first[step] for row in strong[1:] for step, loss in row["loss"]]
    return max(far, default=0.0), len(far)


def to_markdown(result: Mapping[str, Any], command: str) -> str:
    """The report of measured runs."""
    rows, on_gpu = result["rows"], result["rows"][0]["on_gpu"]
    one = {row["kind"]: row["images_per_sec"] for row in reversed(rows)}
    base = rows[0]["ranks"]
    lines = [
        "# Scaling",
        "",
        *(
            []
            if on_gpu
            else [
                "**No figure below is a GPU's.** The ranks share this machine's cores, so more of them "
                "bring no speed; what is shown is that nothing else is lost.",
                "",
            ]
        ),
        f"{result['model']}, {rows[0]['device']}. Made by `{command}`; raw numbers in `scaling.json`.",
        "",
        "![images per second, loss curves](scaling.png)",
        "",
        *_table(
            [
                "scaling",
                "ranks",
                "threads a rank",
                "batch a rank",
                "global batch",
                "images/s",
                f"efficiency against {base}",
                "waits for data (%)",
                "memory a rank at a step's peak (MiB, ledger, lowest–highest rank)",
            ],
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
                    f"{row['ledger_peak_bytes']['min'] / MIB:.1f}–{row['ledger_peak_bytes']['max'] / MIB:.1f}",
                ]
                for row in rows
            ],
        ),
        "",
        "Efficiency is images/s per rank against the fewest ranks'. Strong scaling keeps the global batch, weak the "
        "batch a rank.",
        "",
    ]
    distance, points = _loss_distance(rows)
    if points:
        lines += [
            f"**Loss curves** of the same global batch differ by at most {100 * distance:.2g} % over {points} logged "
            "steps (BatchNorm, where a model has it, takes its statistics from a rank's own images).",
            "",
        ]
    lines += ["## Our loop against a bare one", ""]
    lines += _table(
        ["ranks", "steps an epoch", "ours (s an epoch)", "bare (s)", "overhead", "by round", "communication share"],
        [
            [
                loop["ranks"],
                loop["steps"],
                f"{_median(loop, 'ours'):.3f}",
                f"{_median(loop, 'bare'):.3f}",
                f"{100 * loop['overhead']:+.1f} %",
                ", ".join(f"{100 * x:+.1f}" for x in loop["overhead_rounds"]),
                "–" if loop["communication_share"] is None else f"{100 * loop['communication_share']:.1f} %",
            ]
            for loop in result["loops"]
        ],
        0,
    )
    lines += [
        "",
        "Bare: torch's DDP, the same optimizer, loss and loader, no log, no check, no schedule. The loops take turns "
        "on the same epochs of batches in the same processes, where the C library keeps freed memory (else which loop "
        "pays for getting it back is luck); overhead and share are medians over the rounds. "
        "Communication share: what the bare loop saves when its ranks do not talk (`no_sync`); what overlaps with "
        "computing is not in it.",
        "",
    ]
    return "\n".join(lines)


def _median(loop: Mapping[str, Any], name: str) -> float:
    taken = sorted(loop["epoch_s"][name])
    return taken[len(taken) // 2]


def _counted_rows(counts: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for engine, terms in sorted(_FORMULA.items()):
        facts = Traffic(**counts["facts"]["fsdp2" if engine == "fsdp2" else "ddp"])
        for what in WHAT:
            wanted = {ranks: formulas(engine, facts, ranks)[what] for ranks in (2, 3)}
            found = {ranks: counts["counted"][f"{engine}-{ranks}"][what] for ranks in (2, 3)}
            if not any(wanted.values()) and not any(row["bytes"] for row in found.values()):
                continue
            cells: list[object] = [engine, what, terms[what]]
            for ranks in (2, 3):
                same = "" if wanted[ranks] == found[ranks]["bytes"] else " (DIFFERS)"
                cells += [f"{wanted[ranks]:,}", f"{found[ranks]['bytes']:,}{same}", found[ranks]["collectives"]]
            rows.append(cells)
    return rows


def _far_rows(counts: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for engine in sorted(_FORMULA):
        facts = Traffic(**counts["facts"]["fsdp2" if engine == "fsdp2" else "ddp"])
        for ranks in _FAR:
            payload = formulas(engine, facts, ranks)
            reduce = "reduce_scatter" if engine in ("fsdp2", "zero3") else "all_reduce"
            sent = wire_bytes(reduce, payload["gradients"], ranks) + wire_bytes("all_gather", payload["weights"], ranks)
            masks = payload["mask update"]
            gathered = 2 * 8 * facts.prunable * ranks if engine != "ddp" else 0
            rows.append(
                [
                    engine,
                    ranks,
                    f"{sent / MIB:.1f}",
                    f"{payload['buffers']:,}",
                    f"{masks:,}",
                    f"{gathered:,}",
                    f"{log_line_bytes(ranks):,}",
                ]
            )
    return rows


def model_to_markdown(result: Mapping[str, Any], command: str) -> str:
    """What grows with the number of ranks: formulas, checked by counting, and evaluated far out."""
    counts = result["collectives"]
    facts = Traffic(**counts["facts"]["ddp"])
    lines = [
        "# What goes between the ranks",
        "",
        f"{counts['model']}: P = {facts.weights_bytes // 4:,} parameters in {len(facts.shapes)} tensors, S = "
        f"{facts.prunable} of them prunable, B = {facts.float_buffer_bytes + facts.int_buffer_bytes:,} bytes of "
        "buffers; float32; AdamWPrune. Counted by torch's profiler on gloo ranks on CPU "
        f"(`{command}`; `tests/dist/test_collectives.py` holds two more models to the same formulas). There are bytes "
        "and collectives here and no times: none was measured on GPUs.",
        "",
        "## Payload of one rank, in bytes",
        "",
        "N ranks; W(N) = bytes of the weights with the first dimension of each padded to a multiple of N; K(N) = the "
        "same of what FSDP2 gathers once a step instead of twice (the outermost unit, the last one); P_g = elements "
        "of an optimizer group; p = elements of a tensor. Gradients, weights, buffers and control are of every step, "
        "a mask update comes on top every `--prune-frequency` steps of the ramp.",
        "",
        *_table(
            [
                "engine",
                "what",
                "formula",
                "formula, 2 ranks",
                "counted",
                "collectives",
                "formula, 3 ranks",
                "counted",
                "collectives",
            ],
            _counted_rows(counts),
            3,
        ),
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
        *_table(
            [
                "engine",
                "ranks",
                "gradients and weights sent (MiB a step)",
                "buffers (bytes a step)",
                "mask update (payload, bytes)",
                "mask update: gathered (bytes)",
                "log line (payload, bytes)",
            ],
            _far_rows(counts),
        ),
        "",
        "What grows without bound with N: the gathered tie counts of a mask update (16 S bytes a rank) and the log "
        "line (40 bytes a rank). FSDP2 pads: a bias of 64 becomes 1,024 rows at "
        "1,024 ranks, so a model of small tensors sends more there than DDP would.",
        "",
    ]
    return "\n".join(lines)


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
    for row, style, width, colour in zip(
        strong, ("-", "--", ":", "-."), (3.5, 1.5, 1.5, 1.5), ("#56B4E9", "#000000", "#D55E00", "#009E73"), strict=False
    ):
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
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
