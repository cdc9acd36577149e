"""How a process joins its run: its launcher, and the run folder."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from toolkit.builder.resume import check_same_settings
from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.checkpoint import (
    complete_checkpoints,
    damage_of,
    discard_after,
    newest_checkpoint,
    read_identity,
    step_of,
)
from toolkit.engine.history import is_complete
from toolkit.engine.lock import lock_folder
from toolkit.engine.snapshot import IDENTITY
from toolkit.errors import RunCompleteError, refuse
from toolkit.files import inside, refuse_links_out
from toolkit.log import get_logger, start_logging
from toolkit.process import die_with_parent
from toolkit.shrink import refuse_shrunk

_log = get_logger()


def die_with_launcher() -> None:
    """Have the kernel kill this rank when its launcher dies (Linux), so that no orphan writes on.

    The launcher starts ranks in sessions of their own: killing its process group does not reach them.
    """
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        die_with_parent(os.getppid())


def run_folder(config: Config, opt: str, facts: dict[str, Any], world: World) -> tuple[Path, Path | None, ExitStack]:
    """The run's folder, made, with logging started; the checkpoint to resume from, if any; the lock, held on rank 0.

    Raises ValueError where the folder holds another run, one is going on in it or it cannot be made, RunCompleteError
    where it holds this one, finished.
    """
    if config.resume == "auto" and not config.experiment:
        raise ValueError("--resume auto needs --experiment, the name of the run folder to go on with")
    name = config.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.model.replace('/', '-')}-{opt}"
    folder = inside(Path(config.output), world.gather(name)[0], "--experiment")  # rank 0's clock
    with _take(
        config.output, folder, world
    ) as taken:  # before looking: what another run writes there is not to be judged
        checkpoint = _start_of(config, folder, world)
        lock = taken.pop_all()
    world.barrier()  # all ranks have looked before rank 0 writes
    start_logging(world.rank, folder / "train.log")
    if config.resume == "auto" and checkpoint is None:
        _log.info("--resume auto: no complete checkpoint in %s, starting afresh", folder)
    if checkpoint is not None:
        _check_identity(checkpoint, facts, folder, world)
    return folder, checkpoint, lock


def start_of(config: Config, world: World) -> Path | None:
    """The checkpoint that a run will go on from, before its folder is taken; None where there is none."""
    if config.resume != "auto" or not config.experiment:
        if config.resume and config.resume != "auto":
            refuse_shrunk(Path(config.resume), "--resume")
            return Path(config.resume)
        return None
    return _newest_sound_checkpoint(
        inside(Path(config.output), config.experiment, "--experiment") / "checkpoints", world
    )


def _start_of(config: Config, folder: Path, world: World) -> Path | None:
    """The checkpoint to go on from. Raises as `run_folder` does."""
    checkpoint = Path(config.resume) if config.resume else None
    if config.resume == "auto":
        checkpoint = _newest_sound_checkpoint(folder / "checkpoints", world)
    seen = world.gather(str(checkpoint))
    if len(set(seen)) > 1:
        raise ValueError(f"ranks see different checkpoints ({', '.join(seen)}); --output must be a shared folder")
    if config.resume:
        refuse_shrunk(checkpoint or folder, "--resume")
        check_same_settings(folder, config)
        if is_complete(folder):
            raise RunCompleteError(f"{folder} is complete; nothing to do")
    elif is_complete(folder) or newest_checkpoint(folder / "checkpoints") is not None:
        raise ValueError(f"{folder} holds a run already; continue it with --resume auto or choose another --experiment")
    return checkpoint


def _take(output: str, folder: Path, world: World) -> ExitStack:
    """Make and lock the folder on rank 0; all ranks raise what rank 0 meets."""
    lock, problem = ExitStack(), None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links_out(folder)
            lock = lock_folder(folder)
        except OSError as error:
            problem = ValueError(f"--output {output}: {error.strerror}; name a folder that can be written")
        except ValueError as error:
            problem = error
    problem = world.gather(problem)[0]
    if problem is not None:
        raise problem
    return lock


def _newest_sound_checkpoint(folder: Path, world: World) -> Path | None:
    """The newest complete checkpoint whose files are as they were written; damaged ones are named and left out."""
    damaged: list[str] = []
    if world.is_main:  # one rank reads them; the others look by name
        for path in complete_checkpoints(folder)[::-1]:
            reason = damage_of(path)
            if reason is None:
                break
            damaged.append(path.name)
            _log.warning("%s is damaged (%s); trying the one before", path, reason)
    damaged = world.gather(damaged)[0]
    return next((path for path in complete_checkpoints(folder)[::-1] if path.name not in damaged), None)


def _check_identity(checkpoint: Path, facts: dict[str, Any], folder: Path, world: World) -> None:
    """Raise ValueError unless the checkpoint is of this very run; then drop the later ones that it departs from."""
    identity = read_identity(checkpoint)
    refuse(
        {f"{key} {identity.get(key)}, this run {facts[key]}": identity.get(key) != facts[key] for key in IDENTITY},
        "--resume: the checkpoint has {}; use the settings of its args.yaml, or another --experiment",
    )
    world.barrier()
    if world.is_main:
        for name in discard_after(folder / "checkpoints", step_of(checkpoint)):
            _log.warning("%s is removed: the run goes on from %s, before it", name, checkpoint.name)
