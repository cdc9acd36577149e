"""What a packed optimizer must know under DeepSpeed's ZeRO, where it sees flat slices instead of parameters."""

from torch import nn
from torch.distributed import ProcessGroup

from toolkit.optim.packed import PackedOptimizer

__all__ = ["attach_to_zero"]


def attach_to_zero(optimizer: PackedOptimizer, model: nn.Module, group: ProcessGroup) -> None:
    """Tell the optimizer who holds the other slices, and make DeepSpeed let go of moments that were packed.

    After the first step and after a load, ZeRO-1 and 2 keep views of every state tensor shaped like the flat slice, in
    each model parameter's `_hp_mapping.optim_fragment`; through them the dense moments would live on.
    """

    def release_views() -> None:
        for parameter in model.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None and mapping.optim_fragment is not None:
                mapping.optim_fragment.clear()

    optimizer.shard_group = group
    optimizer.after_repack = release_views
