"""Optimizers that prune. Importing this package registers them in timm's optimizer factory, and does nothing else."""

from toolkit.optim.adamwadv import AdamWAdv
from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.adamwspam import AdamWSPAM
from toolkit.optim.param_groups import param_groups
from toolkit.optim.registry import register_all
from toolkit.optim.sgdprune import SGDPrune

__all__ = ["AdamWAdv", "AdamWPrune", "AdamWSPAM", "SGDPrune", "param_groups"]

register_all()
