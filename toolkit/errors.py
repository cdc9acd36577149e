"""Why a run ends before its plan does, or cannot begin: errors that say how the process is to end, and refusals."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

# What libraries raise over a value that they do not take; most do not name it.
_REFUSALS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
)


@contextlib.contextmanager
def blaming(flag: str, remedy: str = "") -> Iterator[None]:
    """What a library raises over a flag's value becomes a ValueError of one line: flag, reason, remedy."""
    try:
        yield
    except _REFUSALS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{' '.join(flag.split())}: {reason}{f'; {remedy}' if remedy else ''}") from error


def refuse(reasons: Mapping[str, object], words: str = "{}") -> None:
    """Raise ValueError with the first of the reasons that holds, put into `words`; return where none does."""
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(words.format(reason))


class RunError(RuntimeError):
    """A run ends. With `exit_status` 1 it has failed; `on_all_ranks` says that all ranks raise it together."""

    exit_status: ClassVar[int] = 1
    on_all_ranks: ClassVar[bool] = True


class RunCompleteError(RunError):
    """The run to resume is finished."""

    exit_status = 0


class InterruptedRunError(RunError):
    """The run was asked to stop and has saved where it stands."""

    exit_status = 130


class ModelShrunkError(RunError):
    """The run has saved a smaller model, with which its folder's next start goes on."""

    exit_status = 0


class MasksDifferError(RunError):
    """Ranks have pruned different weights."""


class NonFiniteLossError(RunError):
    """A rank's loss is not finite; no rank made the update."""


class SparsityError(RunError):
    """The model does not have the zeros that were asked for."""


class TooManyBadImagesError(RunError):
    """More images cannot be read than a data set may have."""


class LostRankError(RunError):
    """Ranks died or hang: the others' collectives failed or ran out of time."""

    on_all_ranks = False
    # What torch's backends say of a collective that failed; anything else is a rank's own error.
    SIGNS = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "Broken pipe",
        "Application timeout caused pair closure",
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
