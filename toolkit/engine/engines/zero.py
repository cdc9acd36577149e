"""DeepSpeed's ZeRO: the optimizer sees one flat slice a group, in which weights and padding lie side by side.

A group's parameters stand one behind the other in a flat tensor of float32, cut into one slice a rank (stage 3 cuts
each parameter first, and a slice is the parts' row). With P parameters in the group, `slice` [s] on each rank:

    slice    | part of p1 | p2 | ... | part of pk | padding |     a rank's slice may begin and end within a parameter
    segment  start (in the parameter), place (in the slice), length; at most one a parameter and rank
    FlatSlice.ranges  a Range for each of the P parameters in order, an empty one where this rank has none
    moments  [s] while dense, so a parameter's part of one is moment[place : place + length]

With this map a checkpoint knows which part of which parameter a rank holds, pruning ranks weights in the order of the
parameters, and padding is told apart from weights (under ZeRO-3 it is uninitialised memory).
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.dist import World
from toolkit.engine.clip import Part
from toolkit.engine.engines.ddp import Engine, States, exchange, hold, parameter_names
from toolkit.engine.engines.zero_memory import bucket_bytes, kept_beside, offloads, watched
from toolkit.engine.shard import Shard
from toolkit.errors import refuse
from toolkit.memory.ledger import Owners
from toolkit.memory.probe import StepProbe
from toolkit.prune.mask import count_zeros
from toolkit.prune.packing import dense_state
from toolkit.prune.spans import Range, Ranges


@dataclass(frozen=True)
class Segment:
    """`length` elements of a parameter, from its element `start` on, at `place` of this rank's flat slice."""

    start: int
    place: int
    length: int

    def of(self, values: Tensor) -> Tensor:
        """This segment's part of the slice, or of a moment laid out like it: a view."""
        return values[self.place : self.place + self.length]

    def within(self, values: Tensor) -> Tensor:
        """This segment's part of the whole parameter, or of something shaped like it, flat: a view."""
        return values.reshape(-1)[self.start : self.start + self.length]


@dataclass(frozen=True)
class FlatSlice:
    """This rank's slice of a group: whole shapes of all the group's parameters, in order, and its segments of some."""

    flat: Tensor
    shapes: dict[str, torch.Size]
    segments: dict[str, Segment]

    def ranges(self, numbers: Mapping[str, int]) -> list[Range]:
        """Where each of the group's parameters lies; `numbers` of those that the optimizer was made with, by name."""
        held = [(name, self.segments.get(name, Segment(0, 0, 0))) for name in self.shapes]
        return [Range(name, one.place, one.place + one.length, one.start, numbers.get(name)) for name, one in held]

    def shard(self, name: str, values: Tensor) -> Shard:
        """This rank's part of a parameter in the slice, or in a moment or an average laid out like it."""
        segment = self.segments.get(name, Segment(0, 0, 0))
        return Shard(self.shapes[name], segment.start, segment.of(values))


def slices_of(optimizer: Any, stage: int, model: nn.Module, world: World) -> list[FlatSlice]:
    """This rank's slice of each group. `optimizer` is DeepSpeed's."""
    names, made = parameter_names(model), []
    if stage == 3:
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups
    for number, (flat, group) in enumerate(zip(flats, groups, strict=True)):
        one = FlatSlice(flat, {}, {})
        begin, filled = flat.numel() * world.rank, 0  # where the slice begins in the group; how much of it is taken
        for parameter in group:
            if stage == 3:
                size, shape = parameter.partition_numel(), parameter.ds_shape
                start, stop, place = size * world.rank, min(size * (world.rank + 1), shape.numel()), filled
                filled += size
            else:
                # a view of the group's flat tensor, wherever DeepSpeed leaves gaps between parameters
                offset = parameter.storage_offset() - optimizer.bit16_groups_flat[number].storage_offset()
                shape = parameter.shape
                start, stop = max(0, begin - offset), min(shape.numel(), begin + flat.numel() - offset)
                place = offset + start - begin
            one.shapes[names[id(parameter)]] = shape
            if start < stop:
                one.segments[names[id(parameter)]] = Segment(start, place, stop - start)
        made.append(one)
    return made


def inner_of(optimizer: Any) -> Any:
    """The optimizer that wrappers, Accelerate's and DeepSpeed's, are around."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _is_shaped(value: Any) -> bool:
    """Whether it is a tensor with an entry a weight, not a number or a counter."""
    return torch.is_tensor(value) and value.ndim > 0


class ZeroEngine(Engine):
    """See Engine. `model` is DeepSpeed's engine around the module."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._deepspeed: Any = self.model
        self._zero: Any = self._deepspeed.optimizer
        self._stage: int = self._deepspeed.zero_optimization_stage()  # type: ignore[operator]
        self.name = f"zero{self._stage}"
        self.slices = slices_of(self._zero, self._stage, self.module, self._world)
        self._sliced = {name for one in self.slices for name in one.shapes}

    def backward(self, loss: Tensor, step: int, *, last: bool, probe: StepProbe | None = None) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(is_boundary=last)
        with self._no_sync(last), watched(self._zero, self.module, probe):
            self._deepspeed.backward(loss if self.scaler is None else self.scaler.scale(loss))

    @property
    def offloads(self) -> bool:
        return offloads(self._zero)

    @property
    def bucket_bytes(self) -> int:
        """What ZeRO-3's buckets take between steps."""
        return bucket_bytes(self._zero)

    def ranges_of(self, flat: Tensor) -> Ranges | None:
        """What a slice is made of, as the optimizer knows it that prunes it; None where none does."""
        pruning = getattr(self.inner_optimizer, "pruning", None)
        return None if pruning is None else pruning.flat_slices.get(flat)

    def beside(self) -> Owners:
        return kept_beside(self._zero, self.module, [one.flat for one in self.slices])

    def update(self, step: int, want_norm: bool) -> Tensor | None:
        norm = self._clip() if want_norm or self.clip_grad is not None or self.scaler is not None else None
        self._deepspeed.step()  # which leaves a step out where a gradient is not finite, as the scaler would
        if self.scaler is not None:
            self.scaler.update()
        return norm

    def _unscale(self, parts: list[Part]) -> None:
        shown = []
        for part in parts:
            part.weight.grad = part.gradient  # where torch's scaler looks for it
            shown.append(part.weight)
        self.scaler.unscale_(SimpleNamespace(param_groups=[{"params": shown}]))

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self._world.sum(values)

    def _parts(self) -> list[Part]:
        found: dict[str, Part] = {}
        for number, one in enumerate(self.slices):
            places, flat = self._gradients(number), one.flat.detach()
            for name, shape in one.shapes.items():
                found[name] = Part(flat[:0], None, 0, shape)
                if name in one.segments:
                    segment = one.segments[name]
                    gradient = places[segment.place].view(-1)[: segment.length]
                    found[name] = Part(segment.of(flat), gradient, segment.start, shape)
        frozen = Part(torch.empty(0), None, 0, torch.Size())
        return [found.get(name, frozen) for name, _ in self.module.named_parameters()]

    def _gradients(self, number: int) -> dict[int, Tensor]:
        """Where DeepSpeed keeps this rank's gradients of a group, by their place in its slice."""
        one, pieces = self.slices[number], self._zero.averaged_gradients.get(number)
        if pieces is None:  # offloaded: flat, on the host, where the copies to it may be under way
            assert one.flat.grad is not None
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
            return {segment.place: segment.of(one.flat.grad) for segment in one.segments.values()}
        places = itertools.accumulate((piece.numel() for piece in pieces[:-1]), initial=0)
        return dict(zip(places, pieces, strict=True))

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        names = {name for name, _ in prunable}
        parts = [
            segment.of(one.flat.detach())
            for one in self.slices
            for name, segment in one.segments.items()
            if name in names
        ]
        counts = [count_zeros(parts), sum(part.numel() for part in parts)]
        zeros, weights = self._world.sum(torch.tensor(counts, dtype=torch.int64, device=self._world.device)).tolist()
        return zeros, weights

    def _others(self) -> dict[str, Tensor]:
        """What is in no slice and may change: buffers, whole on every rank."""
        parameters = parameter_names(self.module).values()
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in parameters}

    def held(self) -> nn.Module:
        return hold([*(one.flat for one in self.slices), *self._others().values()])

    def averages(self, ema: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return zip((one.flat for one in self.slices), ema.parameters(), strict=False)  # buffers come behind

    @contextlib.contextmanager
    def evaluated(self, ema: nn.Module | None) -> Iterator[nn.Module]:
        if ema is not None:
            self._show(ema, ema)
        yield self.module
        if ema is not None:
            self._show(ema, None)

    def _show(self, ema: nn.Module, shown: nn.Module | None) -> None:
        """Swap buffers with the averages', and put `shown` into the module, where None is what is trained."""
        exchange(hold(self._others().values()), hold(list(ema.parameters())[len(self.slices) :]))
        self._fill((name, self.whole(part)) for name, part in self.weights(shown) if name in self._sliced)

    def weights(self, ema: nn.Module | None = None) -> Iterator[tuple[str, Tensor | Shard]]:
        held = [part.detach() for part in (self.held() if ema is None else ema).parameters()]
        homes = {name: (one, flat) for one, flat in zip(self.slices, held, strict=False) for name in one.shapes}
        others = dict(zip(self._others(), held[len(self.slices) :], strict=True))
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if name in homes:
                yield name, homes[name][0].shard(name, homes[name][1])
            else:
                yield name, others[name] if name in others else self._frozen(tensor)

    def _frozen(self, parameter: Any) -> Tensor | Shard:
        """A parameter that is not trained, and so its own average; ZeRO-3 keeps it in parts all the same."""
        if self._stage < 3:
            return parameter.detach()
        start = parameter.partition_numel() * self._world.rank
        return Shard(parameter.ds_shape, start, parameter.ds_tensor[: max(0, parameter.ds_numel - start)])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self._stage == 3:
            self._fill(weights.items())
        else:
            self.module.load_state_dict(dict(weights))
        self._zero.refresh_fp32_params()

    @torch.no_grad()
    def _fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put whole weights and buffers into the module, whose slices stay."""
        import deepspeed

        own = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        for name, whole in weights:
            parts = [own[name]] if self._stage == 3 and isinstance(own[name], nn.Parameter) else []
            with deepspeed.zero.GatheredParameters(parts, modifier_rank=0):
                if self._world.is_main or not parts:
                    own[name].copy_(whole)

    def load_average(self, ema: nn.Module, weights: Mapping[str, Tensor]) -> None:
        parts = list(ema.parameters())
        for one, flat in zip(self.slices, parts, strict=False):
            for name, segment in one.segments.items():
                segment.of(flat).copy_(segment.within(weights[name]))
        for name, part in zip(self._others(), parts[len(self.slices) :], strict=True):
            part.copy_(weights[name])

    def optimizer_states(self) -> Iterator[tuple[str, str, Any]]:
        for one in self.slices:
            state = self.optimizer_state.get(one.flat, {})
            tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
            numbers = {key: value for key, value in state.items() if key not in tensors}
            dense = {**numbers, **dense_state(one.flat.detach(), tensors, self.ranges_of(one.flat))}
            for name in one.shapes:
                for key, value in dense.items():
                    yield name, key, one.shard(name, value) if _is_shaped(value) else value

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        flats: dict[int, dict[str, Tensor]] = {}
        for number, one in enumerate(self.slices):
            # The group's keys and counters, also where this rank's slice is nothing but padding.
            first: Mapping[str, Tensor] = next((states[name] for name in one.shapes if name in states), {})
            made = {
                key: torch.zeros(one.flat.shape, dtype=value.dtype, device=value.device)  # on the host
                if _is_shaped(value)
                else value
                for key, value in first.items()
            }
            for name, segment in one.segments.items():
                for key, value in states.get(name, {}).items():
                    if _is_shaped(value):
                        segment.of(made[key]).copy_(segment.within(value))
            if made:
                flats[number] = made
        # ZeRO-3 shows its optimizer a slice only while it steps.
        shown = [group["params"] for group in self.inner_optimizer.param_groups]
        for group, one in zip(self.inner_optimizer.param_groups, self.slices, strict=True):
            group["params"] = [one.flat]
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
    stage, base = engine.zero_optimization_stage(), inner_of(engine.optimizer)
    pruning = getattr(base, "pruning", None)
    if pruning is None or not pruning.schedule.enabled or base is engine.optimizer:
        return
    world = World.detect(engine.device)
    marked = [group for group in base.param_groups if group.get("prunable")]
    refuse(
        {
            f"zero_optimization stage {stage} with mixed precision": stage == 0,
            f"{engine.dp_world_size} of {world.num_ranks} ranks as data parallel": engine.dp_world_size
            != world.num_ranks,
            f"scope={pruning.options.scope!r}": pruning.options.scope != "global",
            f"{len(marked)} groups marked prunable, where param_groups(model) makes the one it takes": len(marked) != 1,
        },
        f"{type(base).__name__} under DeepSpeed does not go with {{}}; use FSDP2 or DDP",
    )
    known = getattr(base, "numbers", {})  # of the parameters that it was made with
    numbers = {name: known[p] for name, p in engine.module.named_parameters() if p in known}
    shown = zip(base.param_groups, slices_of(engine.optimizer, stage, engine.module, world), strict=True)
    pruning.shard_group, pruning.after_repack = dist.group.WORLD, functools.partial(_release_views, engine.module)
    pruning.flat_slices = {one.flat: one.ranges(numbers) for group, one in shown if group.get("prunable")}


def _release_views(module: nn.Module) -> None:
    for parameter in module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None and mapping.optim_fragment is not None:
            mapping.optim_fragment.clear()
