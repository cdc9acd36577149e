"""Where the toolkit keeps what it can make again: compiled code, indexes of other people's shards."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The toolkit's folder under the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamwprune-toolkit"
