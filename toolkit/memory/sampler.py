"""Of a whole device and of the host's process once a second, from one thread, for the life of a run."""

import threading
import time
from typing import Any

from toolkit.markdown import MIB
from toolkit.memory.allocator import resident_bytes
from toolkit.memory.device_load import LOAD
from toolkit.memory.device_use import Source, read_or_none


class _Readings:
    """What was read of one kind: how often, the sum and the highest; and how often and the sum since `recent`."""

    def __init__(self) -> None:
        self.count = self._new = 0
        self.total = self._new_total = 0.0
        self.highest = float("-inf")

    def take(self, value: float) -> None:
        self.count, self.total, self.highest = self.count + 1, self.total + value, max(self.highest, value)
        self._new, self._new_total = self._new + 1, self._new_total + value

    def recent(self) -> float | None:
        """The mean since the last call."""
        mean = self._new_total / self._new if self._new else None
        self._new, self._new_total = 0, 0.0
        return mean


class MemorySampler:
    """Samples until `stop` and keeps sums and peaks, not the samples: a run may take weeks.

    `use` reads the bytes in use on the device, `load` what it does. A reading takes tens of microseconds, but for
    rocm-smi, which is a process of its own: at one a second less than 0.1 % of the time.
    """

    def __init__(
        self, use: Source[int] | None, load: Source[dict[str, float]] | None = None, interval_s: float = 1.0
    ) -> None:
        self.use, self.load = use, load
        self.interval_s = interval_s
        self.count = 0
        self._sum_bytes = self._sum_floor_mib = 0
        self._first: int | None = None
        self._peak: int | None = None
        self._recent: dict[str, int | None] = {"device_used_bytes": None, "rss_bytes": None}
        self._load = {kind: _Readings() for kind in LOAD}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            begin = time.perf_counter()
            self._take(read_or_none(self.use), resident_bytes(), read_or_none(self.load) or {})
            if self._end.wait(max(0.0, self.interval_s - (time.perf_counter() - begin))):
                return

    def _take(self, used: int | None, resident: int | None, load: dict[str, float]) -> None:
        with self._lock:
            for kind, reading in load.items():
                self._load[kind].take(reading)
            for key, value in (("device_used_bytes", used), ("rss_bytes", resident)):
                if value is not None:
                    self._recent[key] = max(value, self._recent[key] or 0)
            if used is not None:
                self.count += 1
                self._sum_bytes += used
                self._sum_floor_mib += used // MIB
                self._first = used if self._first is None else self._first
                self._peak = max(used, self._peak or 0)

    def recent(self) -> dict[str, int | None]:
        """The highest readings since the last call; None where there were none."""
        with self._lock:
            recent, self._recent = self._recent, dict.fromkeys(self._recent)
        return recent

    def recent_load(self) -> dict[str, float | None]:
        """The mean of each kind of load since the last call; None where there was none."""
        with self._lock:
            return {kind: readings.recent() for kind, readings in self._load.items()}

    def stop(self) -> None:
        """End the thread; the figures stay."""
        self._end.set()
        self._thread.join(self.interval_s + 1)

    def figures(self) -> dict[str, Any]:
        """Whole-device use over the life: mean, peak, first reading; None where nothing was read.

        `device_used_study_mib` is the study's column: the mean of readings each cut down to whole MiB. `device_load`
        has mean and highest of what the device told of its load.
        """
        with self._lock:
            return {
                "device_used_mean_bytes": self._sum_bytes // self.count if self.count else None,
                "device_used_peak_bytes": self._peak,
                "device_used_first_bytes": self._first,
                "device_used_study_mib": self._sum_floor_mib / self.count if self.count else None,
                "device_used_samples": self.count,
                "device_load": {
                    kind: {"mean": readings.total / readings.count, "highest": readings.highest}
                    for kind, readings in self._load.items()
                    if readings.count
                },
            }
