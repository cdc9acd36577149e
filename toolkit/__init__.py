"""Train image models with optimizers that prune. Light on purpose: importing it loads no torch."""

__version__ = "0.1.0"

from typing import Any

_LAZY = {"load_shrunk": "toolkit.shrink", "to_semi_structured": "toolkit.semi_structured"}  # name -> where it is


def __getattr__(name: str) -> Any:
    """What needs torch, imported when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
