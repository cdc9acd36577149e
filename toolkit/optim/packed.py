"""Bookkeeping of an optimizer that keeps its moments for survivors only; a subclass brings the update rule.

Until the first mask update a parameter's moments are dense and shaped like it. From then on a prunable parameter owns
packed moments [survivors], a bit mask and a block-offset table, and nothing else of the order of its size.
`state_dict()` is dense and parameter-shaped, with the mask as bool, so it loads into the plain optimizer too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from toolkit.kernels import native
from toolkit.kernels.choice import choose_implementation
from toolkit.kernels.rounding import moment_seed, round_to_bfloat16, weight_seed
from toolkit.log import get_logger
from toolkit.optim.buckets import Bucket, BucketCache, kernel_rows, rate_for
from toolkit.prune.distributed import in_layout_of, read_numbers, to_local
from toolkit.prune.mask import flat_view, pack_bits, unpack_bits
from toolkit.prune.moments import (
    CODED_FROM,
    STATE_DTYPES,
    new_moment,
    write_piece,
)
from toolkit.prune.options import OPTION_NAMES, PruningOptions
from toolkit.prune.packed_store import PackedStore
from toolkit.prune.packing import Packer, span_offsets, survivors_before
from toolkit.prune.pruning import Pruning, dense_states, saved_states
from toolkit.prune.schedule import Schedule
from toolkit.prune.scores import STATE_SCORES
from toolkit.prune.spans import span_at
from toolkit.prune.stores import Piece, in_blocks


class PackedOptimizer(Optimizer):
    """Moments for survivors only. Subclasses define MOMENTS, SCORES and `update`.

    The pruning options live in `defaults` and, for everyone to see, in each group; those given to the constructor
    are in force, also after a `load_state_dict`. A subclass with faster code than `update` says so in FAST and
    KERNEL, and overrides `update_dense` and `rule`; PRUNING decides when and what to prune.
    """

    MOMENTS: tuple[str, ...] = ()  # every state key a subclass may pack
    SCORES: tuple[str, ...] = ()  # the scores its moments allow; the first is the default
    FAST: tuple[str, ...] = ()  # implementations beside the reference
    KERNEL = ""  # name of their packed update
    PRUNING = Pruning

    pruning: Pruning

    def __init__(self, params: Any, defaults: dict[str, Any], pruning: Mapping[str, Any]) -> None:
        options = PruningOptions.of(pruning, scores=self.SCORES, implementations=("auto", "reference", *self.FAST))
        self._attach(options)
        super().__init__(params, {**defaults, **dataclasses.asdict(options)})
        self._number_parameters()
        self._packing.check_prunable()
        self._packing.plan_budget(max(len(self.moment_keys(group)) for group in self.param_groups))

    def _attach(self, options: PruningOptions) -> None:
        """The parts that torch neither copies nor pickles."""
        self._buckets = BucketCache()
        self._warned = False
        # The packing is this optimizer's own; a Pruner on its hooks, as in adamwspam-movement, takes the public name.
        self._store = store = PackedStore(STATE_SCORES[str(options.score)], self.MOMENTS)
        store.precision = options.state_dtype
        self.pruning = self._packing = self.PRUNING(self, options, store)
        self.schedule: Schedule = options

    def _number_parameters(self) -> None:
        """Positions that do not depend on which groups a caller shows: ZeRO and a fused backward show one at a time."""
        every = (parameter for group in self.param_groups for parameter in group["params"])
        self.numbers = {parameter: number for number, parameter in enumerate(every, start=1)}

    def moment_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State keys of the moments a parameter of this group keeps."""
        return self.MOMENTS

    def update(
        self, weight: Tensor, grad: Tensor, moments: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        """One step in place on equally shaped tensors, dense or packed; `step` counts from 1."""
        raise NotImplementedError

    def update_dense(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """One step of dense parameters by torch's fused code; only called where `fused` says so."""
        raise NotImplementedError

    def rule(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        """Hyper-parameters of the kernels of KERNEL but for the learning rate; only called where there are any."""
        raise NotImplementedError

    def fused(self, parameter: Tensor, moment_dtype: torch.dtype) -> bool:
        """Whether torch has a fused update of such a parameter while dense: none rounds moments by chance."""
        by_chance = moment_dtype is torch.bfloat16 and self._store.precision is not None
        return moment_dtype is parameter.dtype and not by_chance

    def update_by_kernel(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """One step by the kernels of KERNEL, all tensors in one call: pruned ones, and dense ones on a GPU."""
        keys, rule = self.moment_keys(group), self.rule(group, bucket.step)
        rule["stochastic_weights"] = self._store.precision is not None
        rows, indices = kernel_rows(bucket, bucket.gradients(group), keys)
        if bucket.how == "triton":
            from toolkit.kernels import triton_packed

            bucket.addresses = bucket.addresses or triton_packed.AddressTable()
            table = bucket.addresses.update(rows, indices)
            kernel = triton_packed.KERNELS[self.KERNEL]
            rule["stochastic"] = rule["stochastic_weights"]
            kernel(rows, table, bucket.step_tensor, lr=rate_for(bucket, group), **rule)
        else:
            native.KERNELS[self.KERNEL](rows, step=bucket.step, lr=float(group["lr"]), **rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, then the masks if they are due. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not ready:
                continue
            for bucket in self._buckets.buckets(ready, self.state, partial(self._sort, group)):
                bucket.count_step()
                if bucket.packed:
                    self._packing.check_layouts(bucket.owners)
                elif bucket.how != "reference":
                    bucket.check_sizes(self.moment_keys(group)[0])
                if bucket.sharded:  # a move of the module gives a DTensor another local part
                    bucket.parameters = [to_local(owner) for owner in bucket.owners]
                if bucket.how == "reference":
                    self._update_reference(bucket, group)
                elif bucket.fused:
                    self.update_dense(bucket, group)
                else:
                    self.update_by_kernel(bucket, group)
        if self.schedule.enabled:
            step = self._packing.count_step()
            if self._packing.is_due(step) and self._packing.update(step):
                self._buckets.clear()
        return loss

    def _sort(self, group: dict[str, Any], ready: list[Tensor]) -> Iterable[Bucket]:
        """Sort the parameters of a group that have a gradient by the code that updates them."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(every) == len(self.numbers) and self.numbers.keys().isdisjoint(every):  # FSDP2's, in their places
            self._number_parameters()
        prunable = {id(parameter) for _, parameter in self._packing.prunable()}
        asked = self.defaults["implementation"] if self.FAST else "reference"
        buckets: dict[tuple[Any, ...], Bucket] = {}
        states = [self._state_of(parameter, group, id(parameter) in prunable) for parameter in ready]
        steps = read_numbers([state["step"] for state in states])
        for parameter, state, counted in zip(ready, states, steps, strict=True):
            packed, step = "offsets" in state, int(counted)
            dtype = self._moment_dtype(parameter, id(parameter) in prunable)
            how = choose_implementation(asked, parameter, dtype, self.FAST, self._store.precision is not None)
            if how != "reference" and not self._is_dense(parameter):
                how = "reference"
            fused = how != "reference" and not packed and self.fused(parameter, dtype)
            key = (how, packed, step, fused, parameter.device, parameter.dtype, dtype)
            bucket = buckets.setdefault(key, Bucket(how, packed, step, fused))
            bucket.sharded |= hasattr(parameter, "to_local")
            bucket.owners.append(parameter)
            bucket.parameters.append(to_local(parameter))
            bucket.states.append(state)
            bucket.spans.append(self.pruning.member(parameter, state).spans)
            bucket.param_indices.append(self.numbers.setdefault(parameter, len(self.numbers) + 1))
        return buckets.values()

    def _is_dense(self, parameter: Tensor) -> bool:
        """Whether a 1-D view lists its elements, as fast code needs. Raises ValueError where it must be and is not."""
        try:
            flat_view(to_local(parameter))
        except ValueError:
            if self.schedule.enabled or self.defaults["implementation"] != "auto":
                raise
            if not self._warned:
                get_logger().warning("a parameter has gaps in memory: the reference update takes it, slower")
                self._warned = True
            return False
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters. Raises ValueError where the group asks for pruning options of its own."""
        for name, own in dataclasses.asdict(self._packing.options).items():
            if param_group.get(name, own) != own:
                raise ValueError(
                    f"a parameter group has {name}={param_group[name]!r}, the optimizer {own!r}; all are pruned "
                    "together: leave it out, make groups by param_groups(model, rules=...), or use two optimizers"
                )
        if "channels" in param_group:
            self._packing.channels = [*(self._packing.channels or []), *param_group["channels"]]
        super().add_param_group({key: value for key, value in param_group.items() if key != "channels"})
        self._packing.note_change()

    def __getstate__(self) -> dict[str, Any]:
        slices = dict(self.pruning.flat_slices)
        kept = (self._packing.keeps_zeros, self._packing.channels, self._store.budget, self._store.precision, slices)
        return {**super().__getstate__(), "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("kept", None)
        super().__setstate__(state)
        if "_packing" not in self.__dict__:  # a copy, or unpickled; a load calls this too
            self._attach(PruningOptions(**{key: self.defaults[key] for key in OPTION_NAMES}))
        if kept is not None:
            self._packing.keeps_zeros, self._packing.channels, self._store.budget, self._store.precision, slices = kept
            self.pruning.flat_slices = slices
        self._buckets.clear()
        self._number_parameters()

    def _state_of(self, parameter: Tensor, group: dict[str, Any], prunable: bool) -> dict[str, Tensor]:
        """The parameter's state, made at its first step."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse or parameter.is_complex():
            raise ValueError(
                f"{type(self).__name__} takes dense real gradients, not {parameter.grad.layout} "
                f"{parameter.grad.dtype}; use torch.optim.SparseAdam or torch.optim.AdamW for this parameter"
            )
        state = self.state[parameter]
        if not state:
            self._packing.note_change()  # it may have been appended to a group's list, past add_param_group
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            like, spans = to_local(parameter), self.pruning.member(parameter, state).spans
            kept = None
            if prunable and self._packing.keeps_zeros:
                state["mask"] = pack_bits(flat_view(like) != 0)
                state["offsets"], kept = span_offsets(state["mask"], spans)
            for key in self.moment_keys(group):
                new_moment(state, key, like, self._moment_dtype(parameter, prunable), spans, kept)
        return state

    def _moment_dtype(self, parameter: Tensor, prunable: bool) -> torch.dtype:
        coded = prunable and parameter.numel() >= CODED_FROM
        dtype = parameter.dtype if self._store.precision is None else STATE_DTYPES[self._store.precision]
        return torch.float32 if (dtype is torch.uint8 or self._store.budget is not None) and not coded else dtype

    def _update_reference(self, bucket: Bucket, group: dict[str, Any]) -> None:
        grads = bucket.gradients(group)
        columns = (bucket.owners, bucket.parameters, grads, bucket.states, bucket.param_indices)
        for owner, parameter, grad, state, index in zip(*columns, strict=True):
            # In the dtype to compute in: the parameter's, as in torch, or float32 and wider where a dtype of the state
            # was asked for. What is all of it is updated in place.
            wider = torch.promote_types(parameter.dtype, torch.float32)
            dtype = parameter.dtype if self._store.precision is None else wider
            moments = {key: state[key] for key in self.moment_keys(group)}
            if "offsets" not in state and {dtype} == {one.dtype for one in (parameter, *moments.values())}:
                self.update(parameter, grad, moments, group, bucket.step)
                continue
            # Where there are gaps, a copy without; a stride that torch leaves open is none.
            dense = in_layout_of(torch.empty_like(parameter, device="meta"), parameter)
            grad = in_layout_of(dense, grad)
            member = self.pruning.member(owner, state)
            member.part = dense
            for piece in in_blocks(member, state.get("offsets"), next(iter(moments.values())).numel()):
                self._update_piece(piece, piece.of(grad), dtype, group, bucket.step, index)
            if dense is not parameter:
                parameter.copy_(dense)

    def _update_piece(
        self, piece: Piece, grad: Tensor, dtype: torch.dtype, group: dict[str, Any], step: int, index: int
    ) -> None:
        """The rule on a piece of a tensor whose moments are packed, or of another dtype than it computes in."""
        span = span_at(piece.member.spans, piece.first)
        seed = moment_seed(step, index if span.number is None else span.number)
        state, place, mask = piece.member.state, piece.of(piece.member.part), None
        weight, packed = place, "offsets" in state
        if packed:
            mask = piece.mask
            pack = Packer(piece.kept, bits=mask)
            weight, grad = pack(place), pack(grad)
        keys = self.moment_keys(group)
        moments, new = {key: piece.moment(key, packed).to(dtype) for key in keys}, weight.to(dtype)
        self.update(new, grad.to(dtype), moments, group, step)
        # Put back what is not updated in place; pruned places become 0 again.
        by_chance = place.dtype is torch.bfloat16 and dtype is torch.float32
        if mask is not None:
            wide = torch.zeros_like(place, dtype=dtype) if by_chance else place.zero_()
            new = wide.masked_scatter_(unpack_bits(mask, len(place)), new.to(wide.dtype))
        if by_chance:  # a 0 stays one
            new = round_to_bfloat16(new, weight_seed(seed), span.place + piece.first - span.first)
        if new is not place:
            place.copy_(new)
        for number, key in enumerate(keys):
            if state[key].dtype is not dtype:
                rest = (mask, piece.first, piece.last, piece.before, piece.member.spans)
                write_piece(state, key, moments[key], *rest, seed=seed + number)

    def state_dict(self) -> dict[str, Any]:
        """The plain optimizer's form: moments dense and shaped like the parameter, the mask as bool."""
        return dense_states(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the form `state_dict` gives, or the plain optimizer's, and pack again."""
        saved = saved_states(self, state_dict, (*self.MOMENTS, "mask"))
        # What is packed is taken a tensor at a time: torch would put all of its dense form on the device.
        packed = {*self.MOMENTS, *(("mask",) if self.pruning is self._packing else ())}
        others = {
            number: {key: value for key, value in state.items() if key not in packed}
            for number, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": others})
        for group in self.param_groups:
            # What the plain optimizer does not know, and the pruning options in force here.
            kept = {"differentiable", "pruning", *group} - set(OPTION_NAMES)
            group.update({key: value for key, value in self.defaults.items() if key not in kept})
        prunable = {id(parameter) for _, parameter in self._packing.prunable()}
        self._packing.fit_loaded(saved)
        for parameter, state in self.state.items():
            if saved.get(parameter):
                # torch's SGD counts no steps; its buffers have begun. A number is taken as torch takes it.
                state["step"] = torch.as_tensor(state.get("step", 1.0), dtype=torch.float32)
            self._pack_loaded(parameter, state, saved.get(parameter, {}), id(parameter) in prunable)
        self._packing.note_change()
        self._packing.after_repack()

    def _pack_loaded(
        self, parameter: Tensor, state: dict[str, Tensor], saved: Mapping[str, Any], prunable: bool
    ) -> None:
        """The dense form of a parameter's state, `saved` as it came -> what is kept."""
        member = self.pruning.member(parameter, state)
        if "mask" in saved and self.pruning is self._packing:  # a Pruner's mask is its own
            state["mask"] = self._packing.pack_loaded_mask(parameter, saved["mask"])
            state["offsets"], _ = span_offsets(state["mask"], member.spans)
        for key in [key for key in self.MOMENTS if key in saved]:
            self._store.load(member, key, to_local(saved[key]), self._moment_dtype(parameter, prunable))

    def survivors(self, parameter: Tensor) -> int:
        """How many of a parameter's weights are not pruned; of a sharded one, on this rank."""
        return survivors_before(self.state[parameter].get("mask"), to_local(parameter).numel())
