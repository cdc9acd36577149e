"""Memory readings of one rank: the accelerator's allocator and device, and the host process. No collectives here."""

import resource
import sys
from pathlib import Path

import torch

__all__ = ["DeviceReading", "read_device", "read_host", "reset_peaks"]

DeviceReading = dict[str, int | None]
_NO_DEVICE: DeviceReading = {
    "allocated_bytes": None,
    "allocated_peak_bytes": None,
    "reserved_bytes": None,
    "reserved_peak_bytes": None,
    "device_used_bytes": None,
}


def read_device(device: torch.device) -> DeviceReading:
    """Allocator and whole-device figures; None, never 0, where there is no accelerator.

    torch's memory functions answer 0 without an accelerator, so the device is asked first.
    """
    if device.type != "cuda":
        return dict(_NO_DEVICE)
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_bytes": stats["allocated_bytes.all.current"],
        "allocated_peak_bytes": stats["allocated_bytes.all.peak"],
        "reserved_bytes": stats["reserved_bytes.all.current"],
        "reserved_peak_bytes": stats["reserved_bytes.all.peak"],
        "device_used_bytes": total - free,
    }


def reset_peaks(device: torch.device) -> None:
    """Start the allocator's peaks anew. Called in one place, at the start of training."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_host() -> dict[str, int]:
    """Resident bytes of this process, now and at its peak (libraries and page-sized rounding included)."""
    fields: dict[str, int] = {}
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                fields[name] = int(rest.split()[0]) * 1024
    if "VmRSS" in fields:
        return {"rss_bytes": fields["VmRSS"], "rss_peak_bytes": fields["VmHWM"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"rss_bytes": peak, "rss_peak_bytes": peak}
