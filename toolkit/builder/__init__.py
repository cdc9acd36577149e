"""The one place where the configuration meets the components: Config -> Run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.config import Config
    from toolkit.engine.run import Run

__all__ = ["build"]


def build(config: "Config") -> "Run":
    """Make every component of a run. Raises ValueError, one line with value, rule and remedy, for what cannot be."""
    from toolkit.builder.run import build_run  # here: commands that only compare settings load no torch
    from toolkit.builder.trackers import check_trackers

    check_trackers(config)
    return build_run(config)
