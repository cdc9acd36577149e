"""Whole-device use once a second, from one thread, for the life of a run."""

import threading
import time

from toolkit.memory.device import DeviceUse, read_or_none

__all__ = ["DeviceSampler"]


class DeviceSampler:
    """Samples a device's use until `stop`; (seconds since the start, bytes) in `samples`.

    A reading takes tens of microseconds, but for rocm-smi, which is a process of its own: at one a second less than
    0.1 % of the time.
    """

    def __init__(self, use: DeviceUse | None, interval_s: float = 1.0) -> None:
        self.use = use
        self.interval_s = interval_s
        self.samples: list[tuple[float, int]] = []
        self._begin = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        if use is not None:
            self._thread.start()

    def _run(self) -> None:
        while True:
            used = read_or_none(self.use)
            if used is not None:
                self.samples.append((time.monotonic() - self._begin, used))
            if self._end.wait(self.interval_s):
                return

    def stop(self) -> None:
        """End the thread; `samples` stay."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(self.interval_s + 1)

    def figures(self) -> dict[str, int | None]:
        """Mean over the life (the study's column), peak and first reading, in bytes; None where nothing was read."""
        values = [used for _, used in self.samples]
        return {
            "device_used_mean_bytes": sum(values) // len(values) if values else None,
            "device_used_peak_bytes": max(values, default=None),
            "device_used_first_bytes": values[0] if values else None,
        }
