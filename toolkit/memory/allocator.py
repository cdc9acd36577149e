"""Memory readings of one rank: the accelerator's allocator and device, and the host process. No collectives here."""

import resource
import sys
from pathlib import Path

import torch

DeviceReading = dict[str, int | None]
# Our names for the allocator's statistics; CUDA and HIP have the same.
_STATISTICS = {
    "allocated_bytes": "allocated_bytes.all.current",
    "allocated_peak_bytes": "allocated_bytes.all.peak",
    "active_peak_bytes": "active_bytes.all.peak",
    "requested_peak_bytes": "requested_bytes.all.peak",
    "reserved_bytes": "reserved_bytes.all.current",
    "reserved_peak_bytes": "reserved_bytes.all.peak",
    "inactive_split_bytes": "inactive_split_bytes.all.current",
    "alloc_retries": "num_alloc_retries",
    "ooms": "num_ooms",
}
PEAKS = ("allocated_peak_bytes", "active_peak_bytes", "requested_peak_bytes", "reserved_peak_bytes")
_PAGE_BYTES = resource.getpagesize()


def read_device(device: torch.device) -> DeviceReading:
    """Allocator and whole-device figures; None, never 0, where there is no accelerator.

    torch's memory functions answer 0 without an accelerator, so the device is asked first.
    """
    if device.type != "cuda":
        return dict.fromkeys((*_STATISTICS, "device_used_bytes"))
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {name: stats.get(key) for name, key in _STATISTICS.items()} | {"device_used_bytes": total - free}


def reset_peaks(device: torch.device) -> None:
    """Start the allocator's peaks anew. In a run only PeakWindows calls it: others' windows would be cut short."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release_blas_workspaces(device: torch.device) -> int | None:
    """Bytes that matrix products kept as scratch, given back to the allocator; None where there is no accelerator.

    torch keeps one a thread and stream, made anew by the next product there: forward and backward have one each, of 32
    MiB on Hopper, and cuBLASLt one of its own.
    """
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return held - torch.cuda.memory_allocated(device)


def resident_bytes() -> int | None:
    """Resident bytes of this process now, None where the system does not tell; some 10 µs."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return None


def read_host() -> dict[str, int]:
    """Resident bytes of this process, now and at its peak (libraries and page-sized rounding included)."""
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    if "VmRSS" in fields:
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return {"rss_bytes": now, "rss_peak_bytes": peak}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"rss_bytes": peak, "rss_peak_bytes": peak}
