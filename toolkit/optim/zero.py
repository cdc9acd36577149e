"""What pruning must know under DeepSpeed's ZeRO, where an optimizer sees flat slices instead of parameters."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from toolkit.optim.packed import PackedOptimizer
from toolkit.prune.distributed import Spans
from toolkit.prune.hooks import Pruner

__all__ = ["attach_to_zero"]


def attach_to_zero(
    target: PackedOptimizer | Pruner, model: nn.Module, group: ProcessGroup, spans: Mapping[Tensor, Spans]
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

    target.shard_group, target.spans = group, spans
    if isinstance(target, PackedOptimizer):
        target.after_repack = release_views
