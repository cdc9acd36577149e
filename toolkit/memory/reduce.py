"""Many ranks' records as one set of figures, and a record's phases as ledgers that add up."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["phase_ledgers", "reduce_ranks"]

# The prediction that a phase's peak is set beside; the others have none.
_PREDICTED_AS = {"warm_up": "dense", "dense": "dense", "final": "final"}


def phase_ledgers(record: Mapping[str, Any], predicted: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
    """The ledger at the peak of each phase's probed step: measured, predicted, the difference, and what has no owner.

    What the allocator and the device hold beyond the rows follows from the same step's readings, and is None where
    there is no allocator: rows + rounding + unexplained = allocated, + cache = reserved, + context and others = the
    whole device, whose peak is that of the run.
    """
    phases = {}
    for name, phase in record["phases"].items():
        expected = predicted.get(_PREDICTED_AS.get(name, ""), {})
        rows = []
        for row in dict.fromkeys([*phase["rows"], *expected]):
            measured, wanted = phase["rows"].get(row, 0), expected.get(row, 0) if expected else None
            if measured or wanted:
                difference = None if wanted is None else measured - wanted
                rows.append(
                    {"name": row, "measured_bytes": measured, "predicted_bytes": wanted, "difference_bytes": difference}
                )
        total, peaks = sum(phase["rows"].values()), phase["peaks"]
        phases[name] = {
            "at": f"the peak within step {phase['step']}, in its {phase['part']}",
            "rank": record["rank"],
            "rows": rows,
            "total_bytes": total,
            "predicted_total_bytes": sum(expected.values()) if expected else None,
            **_above(total, peaks, record["device_used_peak_bytes"]),
        }
    return phases


def _above(total: int, peaks: Mapping[str, int], device_used: int | None) -> dict[str, int | None]:
    allocated, requested = peaks.get("allocated_peak_bytes"), peaks.get("requested_peak_bytes")
    reserved = peaks.get("reserved_peak_bytes")
    rounding = None if allocated is None or requested is None else allocated - requested
    return {
        "rounding_bytes": rounding,
        "unexplained_bytes": None if allocated is None else allocated - (rounding or 0) - total,
        "allocated_peak_bytes": allocated,
        "allocator_cache_bytes": None if reserved is None or allocated is None else reserved - allocated,
        "reserved_peak_bytes": reserved,
        "context_and_others_bytes": None if reserved is None or device_used is None else device_used - reserved,
        "device_used_peak_bytes": device_used,
    }


def reduce_ranks(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """min, mean, max, sum and argmax_rank of every byte figure over the ranks; None where a rank has no reading.

    A ledger row that a rank does not have is 0 there. The sum of a whole device's use counts each device once, however
    many ranks share it.
    """
    flat = [dict(_byte_figures(record)) for record in records]
    reduced: dict[str, dict[str, float | int | None]] = {}
    for key in dict.fromkeys(key for figures in flat for key in figures):
        values = [figures.get(key, 0 if _is_row(key) else None) for figures in flat]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            reduced[key] = dict.fromkeys(("min", "mean", "max", "sum", "argmax_rank"))
            continue
        reduced[key] = {
            "min": min(known),
            "mean": sum(known) / len(known),
            "max": max(known),
            "sum": sum(_once_a_device(records, known) if key.startswith("device_used") else known),
            "argmax_rank": records[known.index(max(known))]["rank"],
        }
    return reduced


def _is_row(key: str) -> bool:
    return key.startswith(("ledger_", "phases."))


def _once_a_device(records: Sequence[Mapping[str, Any]], values: Sequence[int]) -> list[int]:
    """The highest reading of each device, by uuid and host."""
    highest: dict[tuple[Any, Any], int] = {}
    for record, value in zip(records, values, strict=True):
        key = record.get("host_name"), record.get("device_uuid") or record["rank"]
        highest[key] = max(value, highest.get(key, 0))
    return list(highest.values())


def _byte_figures(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | None]]:
    """Every `_bytes` figure and ledger row, and the totals of the ledgers, by dotted name."""
    figures: list[tuple[str, int | None]] = []
    is_ledger = prefix.startswith("ledger_") or prefix.endswith(".rows.")
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            figures += _byte_figures(value, f"{name}.")
        elif key.endswith("_bytes") or is_ledger:
            figures.append((name, value))
    if is_ledger:
        figures.append((f"{prefix}total", sum(record.values())))
    return figures
