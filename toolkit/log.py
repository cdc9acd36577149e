"""The log: rank 0 speaks on the console and in the run folder's train.log, other ranks only when something is wrong."""

import logging
import sys
from pathlib import Path


def printable(text: str) -> str:
    """`text` with what a terminal would obey (a data set's name may hold it) shown as an escape; lines stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _BelowBar(logging.StreamHandler):
    """Console handler that leaves a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        if tqdm is not None and sys.stderr.isatty():
            tqdm.tqdm.write(self.format(record), file=sys.stderr)
        else:
            super().emit(record)


def get_logger() -> logging.Logger:
    """The toolkit's logger."""
    return logging.getLogger("toolkit")


def start_logging(rank: int, file: Path | None = None) -> None:
    """Send rank 0's messages to stderr and, where given, to `file`; other ranks' warnings to stderr."""
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.DEBUG)  # tracebacks go to the file only
    console = _BelowBar(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(console)
    if file is not None and rank == 0:
        handler = logging.FileHandler(file)
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
