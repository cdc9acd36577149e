"""Train an image model: parse, build, train. The command behind train.py, `adamwprune-train` and `-m toolkit.train`."""

import os
import sys
import time
from importlib.util import find_spec

from toolkit.config import Config, parse


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 0 done, 1 failed, 2 bad setting, 130 stopped on request."""
    config = parse(argv)
    if find_spec("accelerate") is None:
        sys.stderr.write("train.py: error: accelerate is not installed; install this package with its [train] extra\n")
        return 2
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_train)(config) or 0  # record: the launcher shows the traceback of the rank that failed


def _train(config: Config) -> int:
    from toolkit.builder import build
    from toolkit.builder.process import RunCompleteError, die_with_launcher
    from toolkit.dist import leave_group
    from toolkit.engine.loop import train
    from toolkit.engine.masks import MasksDifferError
    from toolkit.engine.step import NonFiniteLossError
    from toolkit.engine.stops import InterruptedRunError, LostRankError, SparsityError, TooManyBadImagesError
    from toolkit.log import get_logger, start_logging

    rank = int(os.environ.get("RANK", "0"))
    start_logging(rank)
    die_with_launcher()
    status = 0
    try:
        train(build(config))
    except RunCompleteError as complete:
        get_logger().info("%s", complete)
    except InterruptedRunError as stopped:
        get_logger().info("%s", stopped)
        status = 130
    except KeyboardInterrupt:  # before the first step, or twice: nothing to save
        return 130
    except (MasksDifferError, NonFiniteLossError, SparsityError, TooManyBadImagesError) as error:  # on all ranks alike
        if rank == 0:
            get_logger().error("train.py: error: %s", error)
        status = 1
    except LostRankError as error:  # nothing more is asked of the group
        get_logger().error("train.py: error: %s", error)
        get_logger().debug("traceback", exc_info=True)
        return 1
    except (ValueError, OSError) as error:
        if rank:
            time.sleep(3)  # a mistake all ranks share: rank 0 says it once, and the launcher then ends this process
        # A worker's message is a traceback with the reason at its end; the whole goes into train.log.
        get_logger().error("train.py: error: %s", str(error).strip().splitlines()[-1] if str(error) else repr(error))
        get_logger().debug("traceback", exc_info=True)
        return 2 if isinstance(error, ValueError) else 1  # perhaps this rank alone: the others are not waited for
    leave_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
