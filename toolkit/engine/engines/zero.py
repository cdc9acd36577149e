"""DeepSpeed's ZeRO: the optimizer sees one flat slice a group, in which weights and padding lie side by side.

A group's parameters stand one behind the other in a flat tensor of float32, cut into one slice a rank (stage 3 cuts
each parameter first, and a slice is the parts' row). With P parameters in the group, `slice` [s] on each rank:

    slice    | part of p1 | p2 | ... | part of pk | padding |     a rank's slice may begin and end within a parameter
    segment  name, start (of the parameter), place (in the slice), length; at most one a parameter and rank
    flat_slices  (name, first, stop) for each of the P parameters in order, (name, 0, 0) where this rank has none of it
    moments  [s] while dense, so a parameter's part of one is moment[place : place + length]

With this map whole tensors are brought together, a parameter at a time, pruning ranks weights in the order of the
parameters, and padding is told apart from weights (under ZeRO-3 it is uninitialised memory).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.dist import World
from toolkit.engine.engines import States
from toolkit.engine.engines.ddp import DdpEngine, parameter_names
from toolkit.memory.probe import StepProbe
from toolkit.prune.packing import dense_state


@dataclass(frozen=True)
class Segment:
    """`length` elements of a parameter, from its element `start` on, at `place` of this rank's flat slice."""

    name: str
    start: int
    place: int
    length: int

    def of(self, values: Tensor) -> Tensor:
        """This segment's part of the slice, or of a moment laid out like it: a view."""
        return values[self.place : self.place + self.length]


def slice_map(optimizer: Any, stage: int, names: Mapping[int, str], world: World) -> list[tuple[Tensor, list[Segment]]]:
    """This rank's flat slice of each group, and the segments it is made of. `optimizer` is DeepSpeed's."""
    found = []
    if stage == 3:
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            segments, place = [], 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = size * world.rank
                length = max(0, min(size, parameter.ds_numel - start))
                segments.append(Segment(names[id(parameter)], start, place, length))
                place += size
            found.append((flat, segments))
        return found
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin, segments = flat.numel() * world.rank, []
        offsets = optimizer.round_robin_bit16_offsets[number]
        for parameter, offset in zip(optimizer.round_robin_bit16_groups[number], offsets, strict=True):
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + flat.numel())
            if first < last:
                segments.append(Segment(names[id(parameter)], first - offset, first - begin, last - first))
        found.append((flat, segments))
    return found


def _is_shaped(value: Any) -> bool:
    """Whether it is a tensor with an entry a weight, not a number or a counter."""
    return torch.is_tensor(value) and value.ndim > 0


class ZeroEngine(DdpEngine):
    """See Engine. `model` is DeepSpeed's engine around the module; it clips as its own settings say."""

    def __init__(self, *parts: Any, stage: int, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.name = f"zero{stage}"
        self._stage = stage
        self._deepspeed: Any = self.model
        self._zero: Any = self._deepspeed.optimizer
        self.slices = slice_map(self._zero, stage, parameter_names(self.module), self._world)

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(is_boundary=last)
        with self._no_sync(last):
            self._deepspeed.backward(loss)

    def update(self, step: int, want_norm: bool) -> Tensor | None:
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm() if want_norm else None
        return None if norm is None else torch.as_tensor(float(norm))

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        names = {name for name, _ in prunable}
        counts = torch.zeros(2, dtype=torch.int64, device=self._world.device)
        for flat, segments in self.slices:
            for segment in segments:
                if segment.name in names:
                    zeros = int((segment.of(flat.detach()) == 0).sum())
                    counts += torch.tensor([zeros, segment.length], device=counts.device)
        zeros, weights = self._world.sum(counts).tolist()
        return zeros, weights

    def _whole(self, own: tuple[Segment, Tensor] | None, parameter: Any, dtype: torch.dtype) -> Tensor:
        """Bring a parameter-shaped tensor together from every rank's part: bits are added where others have none."""
        shape = parameter.ds_shape if self._stage == 3 else parameter.shape
        whole = torch.zeros(shape.numel(), dtype=dtype, device=self._world.device)
        if own is not None:
            segment, values = own
            whole[segment.start : segment.start + segment.length] = segment.of(values)
        self._world.sum(whole.view(torch.uint8))
        return whole.view(shape).cpu()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        held = {segment.name: (segment, flat.detach()) for flat, segments in self.slices for segment in segments}
        parameters = dict(self.module.named_parameters())
        for name, buffer in self.module.state_dict().items():
            if name in parameters:
                yield name, self._whole(held.get(name), parameters[name], torch.float32)
            else:
                yield name, buffer.detach().cpu()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self._stage == 3:
            self._load_partitioned(weights)
        else:
            self.module.load_state_dict(dict(weights))
        self._zero.refresh_fp32_params()

    def _load_partitioned(self, weights: Mapping[str, Tensor]) -> None:
        import deepspeed

        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self._world.is_main:
                    parameter.data.copy_(weights[name])
        for name, buffer in self.module.named_buffers():
            buffer.copy_(weights[name])

    def optimizer_states(self) -> Iterator[tuple[str, str, Any]]:
        parameters = dict(self.module.named_parameters())
        for number, (flat, segments) in enumerate(self.slices):
            state = self.optimizer_state.get(flat, {})
            tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
            numbers = {key: value for key, value in state.items() if key not in tensors}
            dense = {**numbers, **dense_state(flat.detach(), tensors)}
            held = {segment.name: segment for segment in segments}
            for name in self._names_of(number):
                for key, value in dense.items():
                    if not _is_shaped(value):
                        yield name, key, value.detach().cpu() if torch.is_tensor(value) else value
                        continue
                    own = (held[name], value) if name in held else None
                    yield name, key, self._whole(own, parameters[name], value.dtype)

    def _names_of(self, number: int) -> list[str]:
        """Every parameter of a group, in the group's order; also those of which this rank has no segment."""
        groups = self._zero.fp16_groups if self._stage == 3 else self._zero.round_robin_bit16_groups
        names = parameter_names(self.module)
        return [names[id(parameter)] for parameter in groups[number]]

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        flats: dict[int, dict[str, Tensor]] = {}
        for number, (flat, segments) in enumerate(self.slices):
            # The group's keys and counters, also where this rank's slice is nothing but padding.
            first: Mapping[str, Tensor] = next((states[name] for name in self._names_of(number) if name in states), {})
            made = {
                key: torch.zeros(flat.shape, dtype=value.dtype, device=flat.device) if _is_shaped(value) else value
                for key, value in first.items()
            }
            for segment in segments:
                for key, value in states.get(segment.name, {}).items():
                    if _is_shaped(value):
                        part = value.reshape(-1)[segment.start : segment.start + segment.length]
                        segment.of(made[key]).copy_(part)
            if made:
                flats[number] = made
        # ZeRO-3 shows its optimizer a slice only while it steps.
        shown = [group["params"] for group in self.inner_optimizer.param_groups]
        for group, (flat, _) in zip(self.inner_optimizer.param_groups, self.slices, strict=True):
            group["params"] = [flat]
        settings = [{**one, "params": [number]} for number, one in enumerate(groups)]
        self.inner_optimizer.load_state_dict({"state": flats, "param_groups": settings})
        for group, parameters in zip(self.inner_optimizer.param_groups, shown, strict=True):
            group["params"] = parameters


def attach(engine: Any) -> None:
    """Tell a pruning optimizer under `deepspeed.initialize` what its flat slices hold, and who holds the others.

        engine, _, _, _ = deepspeed.initialize(model=model, optimizer=AdamWPrune(param_groups(model), ...), config=...)
        attach(engine)  # once, before the first step

    For ZeRO-1, 2 and 3; without ZeRO, or without pruning, there is nothing to tell. It also has DeepSpeed let go of
    moments: after the first step and after a load, ZeRO-1 and 2 keep views of every state tensor shaped like the flat
    slice in each model parameter's `_hp_mapping.optim_fragment`, and through them the dense moments would live on.
    Raises ValueError where ZeRO cannot prune as DDP does.
    """
    zero, stage, model = engine.optimizer, engine.zero_optimization_stage(), engine.module
    base = zero
    while hasattr(base, "optimizer"):
        base = base.optimizer
    pruning = getattr(base, "pruning", None)
    if pruning is None or not pruning.schedule.enabled or base is zero:
        return
    world = World.detect(engine.device)
    marked = [group for group in base.param_groups if group.get("prunable")]
    refused = {
        f"zero_optimization stage {stage} with mixed precision": stage == 0,
        f"{engine.dp_world_size} of {world.num_ranks} ranks as data parallel": engine.dp_world_size != world.num_ranks,
        f"scope={pruning.options.scope!r}": pruning.options.scope != "global",
        f"{len(marked)} groups marked prunable, where param_groups(model) makes the one it takes": len(marked) != 1,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"{type(base).__name__} under DeepSpeed does not go with {what}; use FSDP2 or DDP")
    names, slices = parameter_names(model), {}
    groups = zero.fp16_groups if stage == 3 else zero.round_robin_bit16_groups
    flats = slice_map(zero, stage, names, world)
    for group, (flat, segments), parameters in zip(base.param_groups, flats, groups, strict=True):
        if group.get("prunable"):
            places = {segment.name: (segment.place, segment.place + segment.length) for segment in segments}
            slices[flat] = [(name, *places.get(name, (0, 0))) for name in (names[id(one)] for one in parameters)]

    def release_views() -> None:
        for parameter in model.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None and mapping.optim_fragment is not None:
                mapping.optim_fragment.clear()

    pruning.shard_group, pruning.flat_slices, pruning.after_repack = dist.group.WORLD, slices, release_views
