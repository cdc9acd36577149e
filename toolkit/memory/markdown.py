"""A memory report as Markdown: MiB for people; the JSON beside it has the bytes."""

from collections.abc import Mapping
from typing import Any

from toolkit.markdown import mib, table

_ABOVE = (
    ("rounding_bytes", "rounding to the allocator's blocks"),
    ("blas_workspaces_bytes", "scratch of matrix products (BLAS workspaces)"),
    ("unexplained_bytes", "unexplained"),
    ("allocated_peak_bytes", "**allocated, peak**"),
    ("allocator_cache_bytes", "allocator cache"),
    ("reserved_peak_bytes", "**reserved, peak**"),
    ("context_and_others_bytes", "context and other processes"),
    ("device_used_peak_bytes", "**whole device, peak**"),
)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The ledger of each phase's peak, the ranks side by side, and what is missing."""
    run, lines = report["run"], [f"# Memory of {report['run'].get('model', 'a run')}", ""]
    if report["note"]:
        lines += [f"> **{report['note']}**", ""]
    facts = ", ".join(f"{key} {run[key]}" for key in ("opt", "pruning", "target_sparsity", "world_size") if key in run)
    lines += [f"{facts}. Whole-device use by: {report['sources']['device_used']}. MiB = 2^20 bytes.", ""]
    for lost in report["lost_ranks"]:
        seen = f"last seen at step {lost['last_step']}" if lost["last_step"] else "it left no record"
        lines += [f"> **Rank {lost['rank']} was lost** ({seen}). The figures below are of the other ranks.", ""]
    for name, phase in report["phases"].items():
        lines += _phase(name, phase)
    lines += ["## All ranks", "", *_ranks(report), "", *_load(report)]
    return "\n".join(lines)


def _phase(name: str, phase: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["name"], mib(row["measured_bytes"]), mib(row["predicted_bytes"]), mib(row["difference_bytes"])]
        for row in phase["rows"]
    ]
    total, predicted = phase["total_bytes"], phase["predicted_total_bytes"]
    rows.append(["**sum**", mib(total), mib(predicted), mib(None if predicted is None else total - predicted)])
    rows += [[label, mib(phase[key]), "", ""] for key, label in _ABOVE if phase[key] is not None]
    where = f"{phase['at']}, rank {phase['rank']}"
    return [f"## {name}: {where}", "", *table(["MiB", "measured", "predicted", "difference"], rows), ""]


def _ranks(report: Mapping[str, Any]) -> list[str]:
    wanted = {
        "host.rss_peak_bytes": "host RSS, peak",
        "peaks.life.allocated_peak_bytes": "allocated, peak",
        "peaks.life.reserved_peak_bytes": "reserved, peak",
        "device_used_peak_bytes": "whole device, peak",
        "ledger_end.total": "tensors, end",
    }
    wanted |= {f"phases.{name}.rows.total": f"tensors, {name} peak" for name in report["phases"]}
    found = {label: report["reduced"][key] for key, label in wanted.items() if key in report["reduced"]}
    rows = [
        [label, *(mib(figures[part]) for part in ("min", "mean", "max", "sum")), str(figures["argmax_rank"])]
        for label, figures in found.items()
        if figures["max"] is not None
    ]
    return table(["MiB", "min", "mean", "max", "sum", "rank with most"], rows)


def _load(report: Mapping[str, Any]) -> list[str]:
    """What each rank's device did over the run, where it told."""
    kinds = {"utilisation_percent": "utilisation %", "power_w": "power W", "temperature_c": "temperature °C"}
    told = {record["rank"]: record.get("device_load") or {} for record in report["ranks"]}
    known = [kind for kind in kinds if any(kind in load for load in told.values())]
    rows = [
        [
            str(rank),
            *(f"{load[kind]['mean']:.0f} ({load[kind]['highest']:.0f})" if kind in load else "–" for kind in known),
        ]
        for rank, load in told.items()
    ]
    head = [f"Of the whole device once a second, by {report['sources'].get('device_load')}: mean (highest).", ""]
    return [*head, *table(["rank", *(kinds[kind] for kind in known)], rows), ""] if known else []
