"""Parameters sorted by the code that updates them, and kept so between steps.

Sorting ResNet-50's 161 tensors anew cost 1.5 ms a step, a tenth of it; 161 additions to step counters another 0.5 ms.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.kernels.native import PackedTensor
from toolkit.kernels.rounding import moment_seed
from toolkit.prune.distributed import local_gradient
from toolkit.prune.mask import flat_view, mask_bytes
from toolkit.prune.moments import exponents_of
from toolkit.prune.spans import Spans

States = dict[Tensor, dict[str, Tensor]]
# The first columns of a PackedTensor: weight, gradient, mask, offsets, moments, exponents.
_Columns = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Sequence[Tensor], Sequence[Tensor]]


@dataclass
class Bucket:
    """Parameters of one group that one call updates: by the same code, at the same step, all dense or all packed.

    They lie on one device and have one dtype, as all of a launch must.
    """

    how: str  # reference, native or triton
    packed: bool
    step: int = 0  # of the update at hand, from 1
    fused: bool = False  # whether `update_dense` takes them
    sharded: bool = False  # whether any is a DTensor
    owners: list[Tensor] = field(default_factory=list)  # the optimizer's parameters, which have the gradients
    parameters: list[Tensor] = field(default_factory=list)  # this rank's part of each
    states: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # each parameter's own counter: views of `step_tensor`
    step_tensor: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    param_indices: list[int] = field(default_factory=list)  # position among all the optimizer's parameters
    spans: list[Spans] = field(default_factory=list)  # where blocks and groups of each part begin
    addresses: Any = None  # the table of the Triton kernels

    def share_step_tensor(self) -> None:
        """Make the parameters' counters views of one tensor, so that one addition counts them all.

        Triton's lies on the GPU, where a captured graph can count it.
        """
        device = self.parameters[0].device if self.how == "triton" else "cpu"
        self.step_tensor = torch.full((len(self.states),), float(self.step), dtype=torch.float32, device=device)
        self.steps = list(self.step_tensor.unbind())
        for state, step in zip(self.states, self.steps, strict=True):
            state["step"] = step

    def check_sizes(self, key: str) -> None:
        """Raise ValueError where a parameter no longer has a weight for each value of `key`: code knows addresses."""
        for parameter, state in zip(self.parameters, self.states, strict=True):
            if parameter.numel() != state[key].numel():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has {state[key].numel()} moments, made for another "
                    "size; resize the model before its first step, or give the new weights to a new optimizer"
                )

    def gradients(self, group: dict[str, Any]) -> list[Tensor]:
        """The gradients, each in its parameter's memory layout, negated where the group maximizes."""
        grads = list(map(local_gradient, self.owners, self.parameters))
        return [-grad for grad in grads] if group["maximize"] else grads

    def count_step(self) -> None:
        """One step more, in every parameter's state."""
        self.step_tensor.add_(1)
        self.step = self.step + 1 if self.how == "triton" else int(self.steps[0])


def kernel_rows(bucket: Bucket, grads: Sequence[Tensor], keys: Sequence[str]) -> tuple[list[PackedTensor], list[int]]:
    """What a kernel is told of each span of the bucket's parts, and the numbers that seed its chances."""
    scaled = [exponents_of(key) for key in keys if exponents_of(key) in bucket.states[0]]
    rows, indices = [], []
    parts = (bucket.parameters, grads, bucket.states, bucket.param_indices, bucket.spans)
    for parameter, grad, state, number, spans in zip(*parts, strict=True):
        mask = state["mask"] if bucket.packed else None  # a Pruner keeps one of its own beside dense moments
        offsets = state["offsets"] if bucket.packed else None
        whole = (parameter, grad, mask, offsets, [state[key] for key in keys], [state[key] for key in scaled])
        cuts: Iterable[_Columns] = [whole] if len(spans) == 1 else _cut(*whole, spans)
        for span, columns in zip(spans, cuts, strict=True):
            own = number if span.number is None else span.number
            rows.append(PackedTensor(*columns, moment_seed(bucket.step, own), span.place))
            indices.append(own)
    return rows, indices


def _cut(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    moments: Sequence[Tensor],
    exponents: Sequence[Tensor],
    spans: Spans,
) -> Iterator[_Columns]:
    """The first columns of a part's spans; moments of survivors stay whole, for the offsets count all of them."""

    def parts(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        return flat_view(tensor).split(sizes)

    numels, nothing = [span.numel for span in spans], [None] * len(spans)
    if mask is None or offsets is None:
        columns: list[Sequence[Any]] = [nothing, nothing, [*zip(*(parts(one, numels) for one in moments), strict=True)]]
    else:
        blocks = [span.blocks for span in spans]
        columns = [parts(mask, list(map(mask_bytes, numels))), parts(offsets, blocks), [moments] * len(spans)]
    groups = [span.groups for span in spans]
    coded = [*zip(*(parts(one, groups) for one in exponents), strict=True)] if exponents else [()] * len(spans)
    return zip(parts(weight, numels), parts(grad, numels), *columns, coded, strict=True)


def rate_for(bucket: Bucket, group: dict[str, Any]) -> Any:
    """The learning rate as a number, or as the tensor it is where reading it would wait for the GPU."""
    lr = group["lr"]
    at_hand = isinstance(lr, Tensor) and lr.is_cuda and lr.device == bucket.parameters[0].device
    return lr if at_hand else float(lr)


@dataclass
class _Entry:
    """The buckets of the parameters in `ready`, which are those of a group that have a gradient."""

    ready: list[Tensor]
    states: States
    buckets: list[Bucket]
    num_states: int  # those of other groups too

    def serves(self, ready: list[Tensor], states: States) -> bool:
        """Whether nothing has changed: the same parameters have a gradient, and the states are those known.

        Of the states the number and each bucket's first are looked at: all 161 would cost a tenth of a step.
        """
        if states is not self.states or len(states) != self.num_states or len(ready) != len(self.ready):
            return False
        firsts = ((bucket.owners[0], bucket.states[0], bucket.steps[0]) for bucket in self.buckets)
        return all(map(operator.is_, ready, self.ready)) and all(
            states.get(owner) is known and known.get("step") is step for owner, known, step in firsts
        )


class BucketCache(dict[Tensor, _Entry]):
    """Buckets by the parameters that have a gradient; a parameter is in those of one entry at most.

    Counters are shared within a bucket: a second entry with the same parameter would take its counter out of the first,
    whose additions would then miss it.
    """

    def buckets(
        self, ready: list[Tensor], states: States, sort: Callable[[list[Tensor]], Iterable[Bucket]]
    ) -> list[Bucket]:
        """The buckets of `ready`, sorted anew by `sort` where they are not known."""
        entry = self.get(ready[0])
        if entry is None or not entry.serves(ready, states):
            for stale in [self[parameter] for parameter in ready if parameter in self]:
                for parameter in stale.ready:
                    self.pop(parameter, None)
            entry = _Entry(ready, states, list(sort(ready)), len(states))
            for bucket in entry.buckets:
                bucket.share_step_tensor()
            self.update(dict.fromkeys(ready, entry))
        return entry.buckets
