"""Train image models with optimizers that prune. Light on purpose: importing it loads no torch."""

__version__ = "0.1.0"
