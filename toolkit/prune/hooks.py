"""Magnitude, movement and displacement pruning for any torch optimizer, through its step hooks.

The optimizer is known only by `state`, `param_groups` and hooks. What is kept lies in `optimizer.state` of each
prunable parameter, so a checkpoint of the optimizer carries it: a bit mask, and for movement its scores, for
displacement the first weights. Memory beside the optimizer's own: 0.125 bytes a weight for magnitude, 4.125 for the
other two. In `state_dict()` the mask is a parameter-shaped bool.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from toolkit.prune.channels import ChannelGroup
from toolkit.prune.distributed import to_local
from toolkit.prune.mask import flat_view, pack_bits
from toolkit.prune.options import OPTION_NAMES, PruningOptions
from toolkit.prune.pruning import Pruning, dense_states, saved_states
from toolkit.prune.scores import HOOK_SCORES, movement_increment
from toolkit.prune.stores import MaskedStore, Member, zero_all_pruned

HOOK_METHODS: dict[str, tuple[str, ...]] = {"magnitude": ("magnitude",), "movement": ("movement", "displacement")}
_OPTIONS = tuple(name for name in OPTION_NAMES if name not in ("regrow", "state_dtype", "implementation"))
_BESIDE_MASK = ("scores", "initial_weights")  # what movement and displacement keep


class Pruner(Pruning):
    """Prunes an optimizer through its hooks; the score is magnitude, movement or displacement.

    Movement is Sanh et al. (arXiv 2005.07683) with hard top-k: S <- S - lr g w, with one departure: a pruned weight
    is 0 in the model, so its score rests (they keep w beside the masked one). Magnitude and displacement know nothing
    of a pruned weight, which stays pruned.
    """

    def __init__(self, optimizer: Optimizer, options: PruningOptions) -> None:
        self._score = str(options.score)
        store = MaskedStore(HOOK_SCORES[self._score], _BESIDE_MASK, pruned_compete=self._score == "movement")
        super().__init__(optimizer, options, store)
        self._first: dict[Tensor, dict[str, Tensor]] = {}  # what a pre-hook made, until its post-hook
        if not options.enabled:
            return
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(dense_states)
        optimizer.register_load_state_dict_pre_hook(self._note_saved_scores)
        optimizer.register_load_state_dict_post_hook(self._masks_to_bits)

    def known_scores(self) -> tuple[str, ...]:
        """Its own alone, which is what it keeps something for."""
        return (self._score,)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note what the update is about to change. A closure is called here, for the gradients it makes."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args = (args[0], lambda: loss, *args[2:])
            kwargs = {key: kwargs[key] for key in kwargs if key != "closure"}
        if not _skipped(optimizer):
            self._note(optimizer)
        return args, kwargs

    @torch.no_grad()
    def _note(self, optimizer: Optimizer) -> None:
        """Kept zeros: their mask. Movement: add this step's -lr g w. Displacement: w0 before the first step."""
        if self._score == "magnitude" and not self.keeps_zeros:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer under a GradScaler
        for _, parameter in self.prunable():
            # The base optimizer fills an empty state by itself, so nothing may be put there before its first step.
            own, part = optimizer.state.get(parameter, {}), to_local(parameter)
            if self.keeps_zeros and "mask" not in own:  # a resumed run has its masks
                self._first.setdefault(parameter, {})["mask"] = pack_bits(flat_view(part) != 0)
                self.note_change()
            if self._score == "displacement" and "initial_weights" not in own:
                self._first.setdefault(parameter, {})["initial_weights"] = part.detach().clone()
            elif self._score == "movement" and parameter.grad is not None:
                group = groups[id(parameter)]
                rate = float(group["lr"]) * (-1.0 if group.get("maximize") else 1.0)
                rate /= 1.0 if scale is None else float(scale)
                added = movement_increment(part, to_local(parameter.grad), rate)
                if "scores" in own:
                    own["scores"].add_(added)
                else:
                    self._first.setdefault(parameter, {})["scores"] = added

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Zero what the update moved away from zero, and change the masks when the schedule says so."""
        for parameter, made in self._first.items():
            optimizer.state[parameter].update(made)
        self._first.clear()
        if _skipped(optimizer):
            return
        step = self.count_step()
        named = self.prunable()
        masked = [parameter for _, parameter in named if "mask" in optimizer.state.get(parameter, {})]
        self.check_layouts(masked)
        if len(masked) < len(named):
            self.note_change()  # one may have been appended to a group's list, past add_param_group
        if self.is_due(step):
            self.update(step)
        members = [Member(name, parameter, optimizer.state.get(parameter, {})) for name, parameter in named]
        zero_all_pruned([member for member in members if member.mask is not None])

    def _note_saved_scores(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """The sums need float32, whatever the parameter's dtype."""
        saved = saved_states(optimizer, state_dict, ("mask", "keep", *_BESIDE_MASK))
        self._first = {p: {"scores": state["scores"]} for p, state in saved.items() if "scores" in state}

    def _masks_to_bits(self, optimizer: Optimizer) -> None:
        self.note_change()
        scores, self._first = self._first, {}
        for parameter, state in optimizer.state.items():
            part = to_local(parameter)
            if "keep" in state:  # the mask's name in checkpoints of version 0.1
                state["mask"] = state.pop("keep")
            if "mask" in state:
                state["mask"] = self.pack_loaded_mask(parameter, state["mask"])
            for key in _BESIDE_MASK:
                if key in state:
                    value = to_local(scores.get(parameter, state).get(key, state[key]))
                    state[key] = torch.empty_like(part, dtype=value.dtype).copy_(value)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimizer to leave this step out (a gradient was not finite)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


@functools.cache
def pruned_by_hooks(base: type[Optimizer], method: str) -> type[Optimizer]:
    """A subclass of `base` that takes pruning options too and prunes by `method`: magnitude or movement.

    The options are those of PruningOptions without regrow, state_dtype and implementation, which need packed state.
    """

    class PrunedOptimizer(base):  # type: ignore[valid-type,misc]
        def __init__(self, params: Any, *args: Any, **options: Any) -> None:
            if options.pop("regrow", 0.0):
                raise ValueError(f"regrow is for pruning by state; {method} pruning takes 0")
            pruning = {key: options.pop(key) for key in _OPTIONS if key in options}
            checked = PruningOptions.of(pruning, scores=HOOK_METHODS[method])
            self._channels: list[ChannelGroup] | None = None  # taken from the groups while the base class is made
            super().__init__(params, *args, **options)
            # Under one key of its own in defaults: AdamWSPAM as base has a `sparsity` that must stay 0.
            self.defaults["pruning"] = {key: getattr(checked, key) for key in _OPTIONS}
            self.pruning = Pruner(self, checked)
            self.pruning.channels = self._channels
            self.pruning.check_prunable()

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if "channels" in param_group:
                self._channels = [*(self._channels or []), *param_group["channels"]]
            super().add_param_group({key: value for key, value in param_group.items() if key != "channels"})
            if isinstance(self.__dict__.get("pruning"), Pruner):  # not yet while the base class is made
                self.pruning.note_change()

        def __getstate__(self) -> dict[str, Any]:
            own = {"keeps_zeros": self.pruning.keeps_zeros, "channels": self.pruning.channels}
            return {**super().__getstate__(), **own}

        def __setstate__(self, state: dict[str, Any]) -> None:
            keeps_zeros, channels = state.pop("keeps_zeros", None), state.pop("channels", None)
            super().__setstate__(state)
            if not isinstance(self.__dict__.get("pruning"), Pruner):  # a copy, or unpickled
                self.pruning = Pruner(self, PruningOptions(**self.defaults["pruning"]))
            if keeps_zeros is not None:
                self.pruning.keeps_zeros, self.pruning.channels = keeps_zeros, channels
                self._channels = self.pruning.channels

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _blank, (base, method), self.__getstate__()

    PrunedOptimizer.__name__ = PrunedOptimizer.__qualname__ = f"{base.__name__}{method.title()}"
    PrunedOptimizer.__doc__ = f"{base.__name__} with {method} pruning through step hooks."
    return PrunedOptimizer


def _blank(base: type[Optimizer], method: str) -> Optimizer:
    """What copy and pickle fill by `__setstate__`."""
    kind: type[Optimizer] = pruned_by_hooks(base, method)  # type: ignore[arg-type]
    return kind.__new__(kind)
