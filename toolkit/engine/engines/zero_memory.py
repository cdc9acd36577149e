"""What DeepSpeed's ZeRO keeps beside weights and the optimizer's state, for the memory ledger."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.memory.ledger import Owners
from toolkit.memory.probe import StepProbe


def buckets(zero: Any) -> list[Tensor]:
    """Where gradients wait to be sent; ZeRO-1 and 2 have them in backward only. `zero` is DeepSpeed's optimizer."""
    held = [bucket.buffer for bucket in zero.ipg_buckets.values()]
    return [one for buffer in held for one in ([buffer] if torch.is_tensor(buffer) else buffer or [])]


def bucket_bytes(zero: Any) -> int:
    """What ZeRO-3's buckets take: so many elements, whatever the model's size."""
    itemsizes = sum(dtype.itemsize for dtype in zero.ipg_buckets)
    return int(zero.reduce_bucket_size) * itemsizes if zero.contiguous_gradients else 0


def offloads(zero: Any) -> bool:
    """Whether the optimizer or weights lie on the host."""
    return any(getattr(zero, switch, False) for switch in ("cpu_offload", "offload_optimizer", "offload_param"))


def kept_beside(zero: Any, module: nn.Module, flats: list[Tensor]) -> Owners:
    """The float32 slices `flats`, this rank's gradients, buckets, and of ZeRO-3 the parts of weights."""
    pieces = [piece for found in zero.averaged_gradients.values() for piece in found or []]
    rows = {"gradients": [*pieces, *(flat.grad for flat in flats if flat.grad is not None)]}
    if hasattr(zero, "grad_partitions_flat_buffer"):
        weights: Any = module.parameters()
        rows["weights"] = [weight.ds_tensor for weight in weights]
        rows["gradients"].append(zero.grad_partitions_flat_buffer)
    return rows | {"flat_copies": flats, "zero_buckets": buckets(zero)}


@contextlib.contextmanager
def watched(zero: Any, module: nn.Module, probe: StepProbe | None) -> Iterator[None]:
    """A backward pass that names whole gradients and buckets to the probe, for they are gone when it ends."""

    def name(weight: Any) -> None:
        assert probe is not None
        probe.name("zero_buckets", *buckets(zero))  # first: a gradient may be a view of one
        found = (weight.grad, getattr(weight, "grad_accum", None))
        probe.name("gradients", *(gradient for gradient in found if gradient is not None))

    trained = [] if probe is None else [weight for weight in module.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(name) for weight in trained]
    yield
    for hook in hooks:
        hook.remove()
