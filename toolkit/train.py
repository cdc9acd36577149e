"""Train an image model: parse, build, train. The command behind train.py, `adamwprune-train` and `-m toolkit.train`."""

import dataclasses
import gc
import os
import sys
import time
from importlib.util import find_spec

from toolkit.cli import parse
from toolkit.config import Config


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 0 done, 1 failed, 2 bad setting, 130 stopped on request."""
    config = parse(argv)
    if find_spec("accelerate") is None:
        sys.stderr.write("train.py: error: accelerate is not installed; install this package with its [train] extra\n")
        return 2
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_train)(config) or 0  # record: the launcher shows the traceback of the rank that failed


def _train(config: Config) -> int:
    from toolkit.builder.process import die_with_launcher
    from toolkit.dist import leave_group
    from toolkit.errors import RunError
    from toolkit.log import get_logger, start_logging

    rank, log = int(os.environ.get("RANK", "0")), get_logger()
    start_logging(rank)
    die_with_launcher()
    try:
        _train_to_the_end(config)
    except KeyboardInterrupt:  # before the first step, or twice: nothing to save
        return 130
    except RunError as end:
        if end.exit_status != 1 and rank == 0:
            log.info("%s", end)
        elif rank == 0 or not end.on_all_ranks:
            log.error("train.py: error: %s", end)
            log.debug("traceback", exc_info=True)
        status = end.exit_status
        if not end.on_all_ranks:
            return status  # nothing more is asked of the group
    except (ValueError, OSError) as error:
        if rank:
            time.sleep(3)  # a mistake all ranks share: rank 0 says it once, and the launcher then ends this process
        # A worker's message is a traceback with the reason at its end; the whole goes into train.log.
        log.error("train.py: error: %s", str(error).strip().splitlines()[-1] if str(error) else repr(error))
        log.debug("traceback", exc_info=True)
        return 2 if isinstance(error, ValueError) else 1  # perhaps this rank alone: the others are not waited for
    else:
        status = 0
    leave_group()
    return status


def _train_to_the_end(config: Config) -> None:
    """Build and train; where the model has shrunk meanwhile, again with what is left of it."""
    from toolkit.builder import build
    from toolkit.engine.loop import train
    from toolkit.errors import ModelShrunkError
    from toolkit.log import get_logger

    while True:
        run = build(config)
        try:
            train(run)
        except ModelShrunkError as end:
            get_logger().info("%s", end)
            config = dataclasses.replace(config, experiment=run.folder.name, resume="auto")
        else:
            return
        del run  # with its model and moments, before the smaller ones are made
        gc.collect()


if __name__ == "__main__":
    sys.exit(main())
