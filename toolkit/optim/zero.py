"""What pruning must know under DeepSpeed's ZeRO, where an optimizer sees flat slices instead of parameters."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from toolkit.prune.distributed import FlatSlices
from toolkit.prune.pruning import Pruning

__all__ = ["attach_to_zero"]


def attach_to_zero(
    pruning: Pruning, model: nn.Module, group: ProcessGroup, flat_slices: Mapping[Tensor, FlatSlices]
) -> None:
    """Tell who holds the other slices and what a slice is made of, and make DeepSpeed let go of moments.

    After the first step and after a load, ZeRO-1 and 2 keep views of every state tensor shaped like the flat slice, in
    each model parameter's `_hp_mapping.optim_fragment`; through them the dense moments would live on.
    """

    def release_views() -> None:
        for parameter in model.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None and mapping.optim_fragment is not None:
                mapping.optim_fragment.clear()

    pruning.shard_group, pruning.flat_slices, pruning.after_repack = group, flat_slices, release_views
