"""DeepSpeed's ZeRO: the optimizer sees one flat slice a group, in which weights and padding lie side by side.

The slice map says which part of which parameter lies where; with it whole tensors are brought together, a parameter
at a time, pruning ranks weights in the order of the parameters, and padding is told apart from weights (under ZeRO-3
it is uninitialised memory).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from toolkit.dist import World
from toolkit.engine.engines import States
from toolkit.engine.engines.ddp import parameter_names
from toolkit.prune.dense import dense_state
from toolkit.prune.distributed import Spans

__all__ = ["Piece", "ZeroSharding", "attach", "slice_map"]


@dataclass(frozen=True)
class Piece:
    """`length` elements of a parameter, from its element `start` on, at `place` of this rank's flat slice."""

    name: str
    start: int
    place: int
    length: int


def slice_map(optimizer: Any, stage: int, names: Mapping[int, str], world: World) -> list[tuple[Tensor, list[Piece]]]:
    """This rank's flat slice of each group, and the pieces it is made of. `optimizer` is DeepSpeed's."""
    found = []
    if stage == 3:
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            pieces, place = [], 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = size * world.rank
                length = max(0, min(size, parameter.ds_numel - start))
                pieces.append(Piece(names[id(parameter)], start, place, length))
                place += size
            found.append((flat, pieces))
        return found
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin, pieces = flat.numel() * world.rank, []
        offsets = optimizer.round_robin_bit16_offsets[number]
        for parameter, offset in zip(optimizer.round_robin_bit16_groups[number], offsets, strict=True):
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + flat.numel())
            if first < last:
                pieces.append(Piece(names[id(parameter)], first - offset, first - begin, last - first))
        found.append((flat, pieces))
    return found


class ZeroSharding:
    """See Sharding. `wrapped` is DeepSpeed's optimizer around ours."""

    updates_in_backward = True

    def __init__(
        self, accelerator: Accelerator, engine: Any, model: nn.Module, optimizer: Optimizer, world: World, stage: int
    ) -> None:
        self.name = f"zero{stage}"
        self._accelerator, self._engine, self._model = accelerator, engine, model
        self._optimizer, self._world, self._stage = optimizer, world, stage
        self._zero = engine.optimizer
        self.slices = slice_map(self._zero, stage, parameter_names(model), world)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss)
        if last:
            self._engine.step()

    def spans(self) -> dict[Tensor, Spans]:
        """What pruning must know of each slice: every parameter's place in it, in the group's order."""
        found: dict[Tensor, Spans] = {}
        for number, (flat, pieces) in enumerate(self.slices):
            places = {piece.name: (piece.place, piece.place + piece.length) for piece in pieces}
            found[flat] = [(name, *places.get(name, (0, 0))) for name in self._names_of(number)]
        return found

    def grad_norm(self) -> Tensor | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(float(norm))

    def count_zeros(self, prunable: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        names = {name for name, _ in prunable}
        counts = torch.zeros(2, dtype=torch.int64, device=self._world.device)
        for flat, pieces in self.slices:
            for piece in pieces:
                if piece.name in names:
                    part = flat.detach()[piece.place : piece.place + piece.length]
                    counts += torch.tensor([int((part == 0).sum()), piece.length], device=counts.device)
        zeros, weights = self._world.sum(counts).tolist()
        return zeros, weights

    def _whole(
        self, piece_of: Mapping[str, tuple[Piece, Tensor]], name: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """Bring a parameter-shaped tensor together from every rank's piece: bits are added where others have none."""
        whole = torch.zeros(shape.numel(), dtype=dtype, device=self._world.device)
        if name in piece_of:
            piece, values = piece_of[name]
            whole[piece.start : piece.start + piece.length] = values
        self._world.sum(whole.view(torch.uint8))
        return whole.view(shape).cpu()

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if self._stage == 3 else parameter.shape

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        held = {
            piece.name: (piece, flat.detach()[piece.place : piece.place + piece.length])
            for flat, pieces in self.slices
            for piece in pieces
        }
        parameters = dict(self._model.named_parameters())
        for name, buffer in self._model.state_dict().items():
            if name in parameters:
                yield name, self._whole(held, name, self._shape(parameters[name]), torch.float32)
            else:
                yield name, buffer.detach().cpu()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self._stage == 3:
            self._load_partitioned(weights)
        else:
            self._model.load_state_dict(dict(weights))
        self._zero.refresh_fp32_params()

    def _load_partitioned(self, weights: Mapping[str, Tensor]) -> None:
        import deepspeed

        for name, parameter in self._model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self._world.is_main:
                    parameter.data.copy_(weights[name])
        for name, buffer in self._model.named_buffers():
            buffer.copy_(weights[name])

    def optimizer_states(self) -> Iterator[tuple[str, str, Tensor]]:
        parameters = dict(self._model.named_parameters())
        for number, (flat, pieces) in enumerate(self.slices):
            state = {key: value for key, value in self._optimizer.state.get(flat, {}).items() if torch.is_tensor(value)}
            dense = dense_state(flat.detach(), state)
            for name in self._names_of(number):
                own = next((piece for piece in pieces if piece.name == name), None)
                for key, value in dense.items():
                    if value.ndim == 0:
                        yield name, key, value.detach().cpu()
                        continue
                    held = {} if own is None else {name: (own, value[own.place : own.place + own.length])}
                    yield name, key, self._whole(held, name, self._shape(parameters[name]), value.dtype)

    def _names_of(self, number: int) -> list[str]:
        """Every parameter of a group, in the group's order; also those of which this rank has no piece."""
        groups = self._zero.fp16_groups if self._stage == 3 else self._zero.round_robin_bit16_groups
        names = parameter_names(self._model)
        return [names[id(parameter)] for parameter in groups[number]]

    def load_optimizer_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        flats: dict[int, dict[str, Tensor]] = {}
        for number, (flat, pieces) in enumerate(self.slices):
            # The group's keys and counters, also where this rank's slice is nothing but padding.
            first: Mapping[str, Tensor] = next((states[name] for name in self._names_of(number) if name in states), {})
            made = {
                key: value if value.ndim == 0 else torch.zeros(flat.shape, dtype=value.dtype, device=flat.device)
                for key, value in first.items()
            }
            for piece in pieces:
                for key, value in states.get(piece.name, {}).items():
                    if value.ndim:
                        part = value.reshape(-1)[piece.start : piece.start + piece.length]
                        made[key][piece.place : piece.place + piece.length] = part.to(flat.device)
            if made:
                flats[number] = made
        # ZeRO-3 shows its optimizer a slice only while it steps.
        shown = [group["params"] for group in self._optimizer.param_groups]
        for group, (flat, _) in zip(self._optimizer.param_groups, self.slices, strict=True):
            group["params"] = [flat]
        settings = [{**one, "params": [number]} for number, one in enumerate(groups)]
        self._optimizer.load_state_dict({"state": flats, "param_groups": settings})
        for group, parameters in zip(self._optimizer.param_groups, shown, strict=True):
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
    for group, (flat, pieces), parameters in zip(base.param_groups, flats, groups, strict=True):
        if group.get("prunable"):
            places = {piece.name: (piece.place, piece.place + piece.length) for piece in pieces}
            slices[flat] = [(name, *places.get(name, (0, 0))) for name in (names[id(one)] for one in parameters)]

    def release_views() -> None:
        for parameter in model.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None and mapping.optim_fragment is not None:
                mapping.optim_fragment.clear()

    pruning.shard_group, pruning.flat_slices, pruning.after_repack = dist.group.WORLD, slices, release_views
