"""One run at a time in a run folder: a lock that ends with the process that holds it."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from toolkit.log import get_logger

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_folder(folder: Path) -> contextlib.ExitStack:
    """Hold `<folder>/.lock` until the stack that is returned closes, or the process ends.

    The file may be left over, only a living process's lock counts. A POSIX record lock: flock(2) would be inherited by
    the data workers, which outlive a killed rank by seconds, and a restart would find the folder taken. It also works
    between hosts on NFS. Raises ValueError where another process holds it, and OSError where the file cannot be made.
    """
    with contextlib.ExitStack() as held:
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        held.callback(os.close, file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{folder} is being written by another run; wait for its end or choose another --experiment"
                ) from error
            if error.errno not in _UNSUPPORTED:
                raise
            get_logger().warning("%s cannot be locked here (%s): do not start two runs in it", folder, error)
        return held.pop_all()
