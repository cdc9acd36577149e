"""Where a run's scalars go: Accelerate's trackers, by --report-to."""

import os
import secrets
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)

from toolkit.config import Config
from toolkit.engine.checkpoint import step_of
from toolkit.errors import refuse
from toolkit.files import write_atomically


def check_trackers(config: Config) -> None:
    """Raise ValueError, with the command that mends it, where a tracker's package is not installed."""
    missing = set(config.report_to) - {"none", *map(str, get_available_trackers())}
    refuse({f"--report-to {name}: {name} is not installed; pip install {name}": True for name in sorted(missing)})


def start_trackers(
    config: Config, facts: dict[str, Any], folder: Path, resume_from: Path | None
) -> list[GeneralTracker]:
    """The trackers of --report-to, started, for the run in `folder`; call on one rank.

    A resumed run goes on where it was in each of them. Raises ValueError for what a tracker raises.
    """
    settings, again = config.to_dict() | facts, resume_from is not None
    trackers: list[GeneralTracker] = []
    for name in dict.fromkeys(config.report_to):
        project = os.environ.get(f"{name.upper()}_PROJECT", folder.resolve().parent.name)
        if name == "tensorboard":
            # A resumed run goes over the steps after its checkpoint again; their first version is dropped.
            purge_step = None if resume_from is None else step_of(resume_from) + 1
            trackers.append(TensorBoardTracker("tb", folder, purge_step=purge_step))
        elif name == "wandb":
            run_id = _wandb_id(folder, again)
            trackers.append(
                WandBTracker(project, name=folder.name, dir=folder, id=run_id, resume="allow", config=settings)
            )
        elif name == "trackio":
            resume = "allow" if again else "never"
            trackers.append(TrackioTracker(project, name=folder.name, resume=resume, config=settings))
    for tracker in trackers:
        try:
            tracker.start()
        except Exception as error:  # each has kinds of its own, as where nobody is logged in
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"--report-to {tracker.name}: {reason}; mend that, or leave it out") from error
    return trackers


def _wandb_id(folder: Path, again: bool) -> str:
    """W&B's name of the run, kept in its folder: a run that goes on has the one it had, any other a new one."""
    path = folder / "wandb" / "id"
    if not (again and path.is_file()):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, secrets.token_hex(8))
    return path.read_text()
