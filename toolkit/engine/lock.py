"""One run at a time in a run folder: a lock that ends with the process that holds it."""

import errno
import fcntl
import os
from pathlib import Path

from toolkit.log import get_logger

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Holds `<folder>/.lock`; the file may be left over, only a living process's lock counts.

    A POSIX record lock: flock(2) would be inherited by the data workers, which outlive a killed rank by seconds, and a
    restart would find the folder taken. It also works between hosts on NFS.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where another process holds it, and OSError where the file cannot be made."""
        self._file: int | None = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{folder} is being written by another run; wait for its end or choose another --experiment"
                ) from error
            if error.errno not in _UNSUPPORTED:
                raise
            get_logger().warning("%s cannot be locked here (%s): do not start two runs in it", folder, error)

    def release(self) -> None:
        """Let others in; also what the process's end does."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
