"""Magnitude, movement and displacement pruning for any torch optimizer, through its step hooks.

The pruner knows an optimizer only by `state`, `param_groups` and hooks. What it keeps lives in `optimizer.state` of
each prunable parameter, so a checkpoint of the optimizer carries it: a bit mask (`keep`), and for movement its scores,
for displacement the initial weights. Memory beside the optimizer's own: 0.125 bytes a weight for magnitude, 4.125 for
the other two. In `state_dict()` the mask is a parameter-shaped bool.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from toolkit.prune.groups import prunable_parameters
from toolkit.prune.mask import flat, pack_bits, unpack_bits, zero_pruned
from toolkit.prune.schedule import Schedule
from toolkit.prune.scope import SCOPES, zero_quotas
from toolkit.prune.scores import MAGNITUDE, MOVEMENT_SCORES, check_score, displacement, movement_increment
from toolkit.prune.select import CHUNK, choose_lowest

__all__ = ["Pruner"]

_STEP = "prune_step"  # counted in each group: ZeRO shows one group per call of step()


class Pruner:
    """Prunes an optimizer's prunable weights by `score`: magnitude, movement or displacement.

    Movement is Sanh et al. (arXiv 2005.07683) with hard top-k: S <- S - lr g w, with one departure: a pruned weight
    is 0 in the model, so its score rests (they keep w beside the masked one). Pruned weights and survivors are ranked
    together by S, so a resting score that survivors fall below brings its weight back, with the value the step at hand
    gives it from 0. Magnitude and displacement know nothing of a pruned weight, which stays pruned.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, score: str, scope: str = "global") -> None:
        check_score(score, (*MAGNITUDE, *MOVEMENT_SCORES))
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} is not known; choose one of {', '.join(SCOPES)}")
        self.optimizer = optimizer
        self.schedule = schedule
        self.score = score
        self.scope = scope
        self._first: dict[Tensor, dict[str, Tensor]] = {}  # what the first step's pre-hook made, until it has passed
        for group in optimizer.param_groups:
            group.setdefault(_STEP, 0)
        if not schedule.on:
            return
        if score in MOVEMENT_SCORES:
            optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._masks_to_bool)
        optimizer.register_load_state_dict_post_hook(self._masks_to_bits)
        # torch copies and pickles an optimizer without its hooks; copy and pickle ask the instance for this.
        optimizer.__reduce_ex__ = self._reduce  # type: ignore[method-assign,assignment]

    def _reduce(self, protocol: int) -> tuple[Any, ...]:
        """A copy of the optimizer is pruned like it."""
        optimizer = self.optimizer
        return _restore, (type(optimizer), optimizer.__getstate__(), self.schedule, self.score, self.scope)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Movement: add this step's -lr g w. Displacement: keep w0 before the first step changes it."""
        learning_rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for _, parameter in prunable_parameters(optimizer.param_groups):
            # The base optimizer fills an empty state by itself, so nothing may be put there before its first step.
            own = optimizer.state.get(parameter, {})
            if self.score == "displacement":
                if "initial_weights" not in own:
                    self._first[parameter] = {"initial_weights": parameter.detach().clone()}
            elif parameter.grad is not None:
                added = movement_increment(parameter, parameter.grad, float(learning_rate[id(parameter)]))
                if "scores" in own:
                    own["scores"].add_(added)
                else:
                    self._first[parameter] = {"scores": added}

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Zero what the update moved away from zero, and change the masks when the schedule says so."""
        for parameter, made in self._first.items():
            optimizer.state[parameter].update(made)
        self._first.clear()
        for group in optimizer.param_groups:
            if group["params"]:
                group[_STEP] += 1
        named = prunable_parameters(optimizer.param_groups)
        if not named:
            return
        step = max(group[_STEP] for group in optimizer.param_groups if group["params"])
        if self.schedule.due(step):
            self._update_masks(named, step)
        for _, parameter in named:
            mask = optimizer.state.get(parameter, {}).get("keep")
            if mask is not None:
                zero_pruned(flat(parameter), mask)

    def _update_masks(self, named: list[tuple[str, Tensor]], step: int) -> None:
        total = sum(parameter.numel() for _, parameter in named)
        zeros = self.schedule.zeros(step, total)
        if zeros == 0:
            return
        for name, parameter in named:
            if parameter.grad is None and not self.optimizer.state.get(parameter):
                raise ValueError(
                    f"{name} is prunable but had no gradient by step {step}, so it has no score; freeze it "
                    "(requires_grad=False, out of the optimizer) or mark its group prunable=False"
                )
        every = range(len(named))
        groups = [(list(every), zeros)]
        if self.scope != "global":
            gone = [self._pruned(parameter) if self.score != "movement" else 0 for _, parameter in named]
            quotas = zero_quotas(self.scope, [parameter.shape for _, parameter in named], gone, zeros)
            groups = [([number], quota) for number, quota in enumerate(quotas)]
        for members, count in groups:
            parameters = [named[number][1] for number in members]
            sources = [partial(self._scores, parameter) for parameter in parameters]
            names, sizes = [named[number][0] for number in members], [p.numel() for p in parameters]
            for parameter, drop in zip(parameters, choose_lowest(sources, names, sizes, count), strict=True):
                self.optimizer.state[parameter]["keep"] = pack_bits(~drop)

    def _pruned(self, parameter: Tensor) -> int:
        mask = self.optimizer.state.get(parameter, {}).get("keep")
        return 0 if mask is None else int((~unpack_bits(mask, parameter.numel())).sum())

    def _scores(self, parameter: Tensor) -> Iterator[Tensor]:
        """Scores of all weights in memory order, CHUNK at a time.

        -inf, so pruned first, are the pruned weights of a score that does not rest, and any weight that is exactly 0:
        a survivor at 0 would be a zero beyond the target. (The base optimizer has just moved the pruned weights; for
        movement, one that it left at 0 has no way back.)
        """
        state = self.optimizer.state[parameter]
        weight = flat(parameter)
        for start in range(0, parameter.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            piece = weight[part]
            gone = piece == 0
            if self.score == "movement":
                scores = flat(state["scores"])[part].float()
            else:
                if self.score == "displacement":
                    scores = displacement(piece, flat(state["initial_weights"])[part])
                else:
                    scores = MAGNITUDE["magnitude"](piece, {})
                if "keep" in state:
                    gone |= ~unpack_bits(state["keep"][start // 8 : (start + CHUNK) // 8], piece.numel())
            yield scores.masked_fill(gone, -torch.inf)

    def _masks_to_bool(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checkpoint form: the mask as a parameter-shaped bool (torch casts a 1-D uint8 to float on loading)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            if "keep" in state:
                dense = torch.empty_like(parameters[index], dtype=torch.bool)
                flat(dense).copy_(unpack_bits(state["keep"], dense.numel()))
                state_dict["state"][index] = {**state, "keep": dense}
        return state_dict

    def _masks_to_bits(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            if "keep" in state:
                state["keep"] = pack_bits(flat(torch.empty_like(parameter).copy_(state["keep"])) != 0)
            for key in ("scores", "initial_weights"):
                if key in state:
                    state[key] = torch.empty_like(parameter).copy_(state[key])


def _restore(kind: type[Optimizer], state: dict[str, Any], schedule: Schedule, score: str, scope: str) -> Optimizer:
    """An optimizer from its state, with a Pruner of its own."""
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    Pruner(optimizer, schedule, score, scope)
    return optimizer
