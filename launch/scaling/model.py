"""What goes between the ranks, as tables: the formulas beside what was counted, and far out."""

from collections.abc import Mapping
from typing import Any

from launch.scaling.collectives import WHAT, Traffic, formulas, log_line_bytes, wire_bytes
from toolkit.markdown import mib, table

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


def _traffic(counts: Mapping[str, Any], engine: str) -> Traffic:
    return Traffic(**counts["facts"]["fsdp2" if engine == "fsdp2" else "ddp"])


def _counted_rows(counts: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for engine, terms in sorted(_FORMULA.items()):
        for what in WHAT:
            wanted = [formulas(engine, _traffic(counts, engine), ranks)[what] for ranks in (2, 3)]
            found = [counts["counted"][f"{engine}-{ranks}"][what] for ranks in (2, 3)]
            if not any(wanted) and not any(row["bytes"] for row in found):
                continue
            cells: list[object] = [engine, what, terms[what]]
            for size, row in zip(wanted, found, strict=True):
                same = "" if size == row["bytes"] else " (DIFFERS)"
                cells += [f"{size:,}", f"{row['bytes']:,}{same}", row["collectives"]]
            rows.append(cells)
    return rows


def _far_rows(counts: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for engine in sorted(_FORMULA):
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
    lines = [
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
        "",
    ]
    return "\n".join(lines)
