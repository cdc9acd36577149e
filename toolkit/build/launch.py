"""How a process joins its run: Accelerate, the seeds, the run folder."""

import ctypes
import datetime
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.checkpoint import newest_checkpoint
from toolkit.log import get_logger, start_logging

__all__ = ["create_accelerator", "die_with_launcher", "run_folder", "seed_everything"]

_PR_SET_PDEATHSIG = 1

_log = get_logger()


def die_with_launcher() -> None:
    """Have the kernel kill this rank when its launcher dies (Linux), so that no orphan writes on.

    The launcher starts ranks in sessions of their own: killing its process group does not reach them.
    """
    if "LOCAL_RANK" not in os.environ or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def create_accelerator(config: Config) -> Accelerator:
    """Join the process group. Raises ValueError where Accelerate did not take all processes the launcher started."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP"))
    on_cpu = not torch.cuda.is_available() and not sharded
    if config.mixed_precision == "fp16" and on_cpu:
        raise ValueError("--amp fp16 needs a GPU (there is no fp16 autocast on CPU); use --amp bf16")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.dist_timeout)),
            # Without the view DDP keeps a second copy of all gradients.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"the launcher started {expected} processes but Accelerate sees {accelerator.num_processes}; start with "
            "accelerate launch --config_file accelerate_configs/<machine>.yaml"
        )
    return accelerator


def seed_everything(seed: int) -> None:
    """The same model on every rank; samples and mixing have their own generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm's model code may use it
    torch.manual_seed(seed)


def run_folder(config: Config, opt: str, world: World) -> tuple[Path, Path | None]:
    """The run's folder, made, with logging started; and the checkpoint to resume from, if any."""
    name = config.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.model.replace('/', '-')}-{opt}"
    folder = Path(config.output) / world.gather(name)[0]  # rank 0's clock
    checkpoint: Path | None = None
    if config.resume == "auto":
        checkpoint = newest_checkpoint(folder / "checkpoints")
    elif config.resume:
        checkpoint = Path(config.resume)
        if not (checkpoint / "COMPLETE").is_file():
            raise ValueError(f"--resume {checkpoint} is not a complete checkpoint; use --resume auto or another folder")
    taken = (folder / "metrics.json").exists() or newest_checkpoint(folder / "checkpoints") is not None
    if taken and not config.resume:
        raise ValueError(f"{folder} holds a run already; continue it with --resume auto or choose another --experiment")
    world.barrier()  # all ranks have looked before rank 0 writes
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    start_logging(world.rank, folder / "train.log")
    if config.resume == "auto" and checkpoint is None:
        _log.info("--resume auto: no complete checkpoint in %s, starting afresh", folder)
    return folder, checkpoint
