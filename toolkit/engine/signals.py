"""A request to stop, from the keyboard or the cluster, as a flag that the loop looks at once a step."""

import signal
from types import FrameType

from toolkit.process import outlive_parent


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) into a flag that all ranks agree on at the next step.

    A second Ctrl-C breaks off.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._before = [signal.signal(number, self._handle) for number in self._SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(self._SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        outlive_parent()
