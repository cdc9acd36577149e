"""Why a run ends before its plan does: a request to stop, and the errors that all ranks raise together."""

import signal
from types import FrameType
from typing import Any

from toolkit.process import outlive_parent

__all__ = [
    "InterruptedRunError",
    "LostRankError",
    "SparsityError",
    "StopRequest",
    "TooManyBadImagesError",
    "check_bad",
]


class InterruptedRunError(Exception):
    """The run was asked to stop and has saved where it stands."""


class SparsityError(Exception):
    """The model does not have the zeros that were asked for."""


class LostRankError(RuntimeError):
    """Ranks died or hang: the others' collectives failed or ran out of time."""

    # What torch's backends say of a collective that failed; anything else is a rank's own error.
    SIGNS = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "Broken pipe",
    )

    @classmethod
    def explains(cls, error: BaseException) -> bool:
        """Whether an error may come from a lost rank."""
        import torch.distributed

        return isinstance(error, torch.distributed.DistError) or (
            isinstance(error, RuntimeError) and any(sign in str(error) for sign in cls.SIGNS)
        )

    def __init__(self, lost: list[dict[str, Any]]) -> None:
        """`lost` as in memory.json."""
        ranks = ", ".join(f"rank {rank['rank']} (last heard of at step {rank['last_step']})" for rank in lost)
        super().__init__(
            f"lost {ranks}: it died or hangs, its own last lines say more; start again with --resume auto to go on "
            "from the newest checkpoint"
        )


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


class TooManyBadImagesError(RuntimeError):
    """More images cannot be read than a data set may have. Raised on all ranks together."""


def check_bad(bad: int, total: int, share: float, what: str) -> None:
    """Raise TooManyBadImagesError where `bad` of `total` images are more than `share` of them, and than ten."""
    limit = max(10, int(share * total))
    if bad > limit:
        raise TooManyBadImagesError(
            f"{bad} of {total} {what} images could not be read, more than {limit}; the log names the first ones, "
            "python -m shards.verify finds all, --max-bad-images lets more by"
        )
