"""Magnitude, movement and displacement pruning for any torch optimizer, through its step hooks.

The pruner knows an optimizer only by `state`, `param_groups` and hooks. What it keeps lives in `optimizer.state` of
each prunable parameter, so a checkpoint of the optimizer carries it: a bit mask (`keep`), and for movement its scores,
for displacement the initial weights. Memory beside the optimizer's own: 0.125 bytes a weight for magnitude, 4.125 for
the other two. In `state_dict()` the mask is a parameter-shaped bool.
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from toolkit.prune.dense import dense_state
from toolkit.prune.distributed import Spans, local, shard_group, sum_over, whole
from toolkit.prune.distribution import SCOPES, zero_quotas
from toolkit.prune.groups import prunable_parameters
from toolkit.prune.mask import flat, pack_bits, unpack_bits, zero_pruned
from toolkit.prune.schedule import Schedule
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
        # What ZeRO does not tell: who holds the rest of a slice, and what a slice is made of.
        self.shard_group: ProcessGroup | None = None
        self.spans: Mapping[Tensor, Spans] = {}
        optimizer.pruner = self  # type: ignore[attr-defined]  # where a caller finds these
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

    def keep_zeros(self) -> None:
        """Weights that are 0 at the first step are pruned from then on: a pruned model goes on."""

        @torch.no_grad()
        def once(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            handle.remove()
            for _, parameter in prunable_parameters(optimizer.param_groups):
                if "keep" not in optimizer.state.get(parameter, {}):  # a resumed run has its masks
                    self._first.setdefault(parameter, {})["keep"] = pack_bits(flat(local(parameter)) != 0)

        handle = self.optimizer.register_step_pre_hook(once)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Movement: add this step's -lr g w. Displacement: keep w0 before the first step changes it."""
        learning_rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for _, parameter in prunable_parameters(optimizer.param_groups):
            # The base optimizer fills an empty state by itself, so nothing may be put there before its first step.
            own = optimizer.state.get(parameter, {})
            if self.score == "displacement":
                if "initial_weights" not in own:
                    self._first.setdefault(parameter, {})["initial_weights"] = local(parameter).detach().clone()
            elif parameter.grad is not None:
                rate = float(learning_rate[id(parameter)])
                added = movement_increment(local(parameter), local(parameter.grad), rate)
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
                zero_pruned(flat(local(parameter)), mask)

    def _update_masks(self, named: list[tuple[str, Tensor]], step: int) -> None:
        group = self.shard_group or shard_group(parameter for _, parameter in named)
        parts = [local(parameter) for _, parameter in named]
        spans = [self.spans.get(parameter, [(name, 0, local(parameter).numel())]) for name, parameter in named]
        sizes = [sum(stop - start for _, start, stop in one) for one in spans]
        gone_now = [self._pruned(parameter) for _, parameter in named]
        padding = sum(part.numel() for part in parts) - sum(sizes)
        pruned = max(0, sum(gone_now) - padding)  # padding has no mask, or is pruned
        total, pruned = sum_over(group, [sum(sizes), pruned], parts[0].device)
        zeros = max(self.schedule.zeros(step, total), pruned)  # more only in a model that came pruned
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
            gone = sum_over(group, gone_now if self.score != "movement" else [0] * len(named), parts[0].device)
            quotas = zero_quotas(self.scope, [parameter.shape for _, parameter in named], gone, zeros)
            groups = [([number], quota) for number, quota in enumerate(quotas)]
        for members, count in groups:
            pieces = [(number, *span) for number in members for span in spans[number]]
            sources = [partial(self._scores, named[number][1], start, stop) for number, _, start, stop in pieces]
            names, counts = [name for _, name, _, _ in pieces], [stop - start for _, _, start, stop in pieces]
            drops = zip(pieces, choose_lowest(sources, names, counts, count, group), strict=True)
            for number, members_of in itertools.groupby(drops, lambda pair: pair[0][0]):
                keep = torch.zeros(parts[number].numel(), dtype=torch.bool, device=parts[number].device)
                for (_, _, start, stop), drop in members_of:
                    keep[start:stop] = ~drop  # padding lies in no piece and stays 0
                self.optimizer.state[named[number][1]]["keep"] = pack_bits(keep)

    def _pruned(self, parameter: Tensor) -> int:
        mask = self.optimizer.state.get(parameter, {}).get("keep")
        return 0 if mask is None else int((~unpack_bits(mask, local(parameter).numel())).sum())

    def _scores(self, parameter: Tensor, first: int, last: int) -> Iterator[Tensor]:
        """Scores of the weights `first` to `last` in memory order, CHUNK at a time.

        -inf, so pruned first, are the pruned weights of a score that does not rest, and any weight that is exactly 0:
        a survivor at 0 would be a zero beyond the target. (The base optimizer has just moved the pruned weights; for
        movement, one that it left at 0 has no way back.)
        """
        state = self.optimizer.state[parameter]
        weight = flat(local(parameter))
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            piece = weight[start:stop]
            gone = piece == 0
            if self.score == "movement":
                scores = flat(state["scores"])[start:stop].float()
            else:
                if self.score == "displacement":
                    scores = displacement(piece, flat(state["initial_weights"])[start:stop])
                else:
                    scores = MAGNITUDE["magnitude"](piece, {})
                if "keep" in state:
                    spare = start % 8  # a piece of a flat slice may begin within a byte
                    bits = state["keep"][start // 8 : (stop + 7) // 8]
                    gone |= ~unpack_bits(bits, spare + piece.numel())[spare:]
            yield scores.masked_fill(gone, -torch.inf)

    def _masks_to_bool(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checkpoint form: the mask as a parameter-shaped bool (torch casts a 1-D uint8 to float on loading)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            own = {key: local(state[key]) for key in ("keep", "scores", "initial_weights") if key in state}
            dense = dense_state(local(parameters[index]), own)
            wholes = {key: whole(value, parameters[index]) for key, value in dense.items()}
            state_dict["state"][index] = {**state, **wholes}
        return state_dict

    def _masks_to_bits(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            part = local(parameter)
            if "keep" in state:
                state["keep"] = pack_bits(flat(torch.empty_like(part).copy_(local(state["keep"]))) != 0)
            for key in ("scores", "initial_weights"):
                if key in state:
                    state[key] = torch.empty_like(part).copy_(local(state[key]))


def _restore(kind: type[Optimizer], state: dict[str, Any], schedule: Schedule, score: str, scope: str) -> Optimizer:
    """An optimizer from its state, with a Pruner of its own."""
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    Pruner(optimizer, schedule, score, scope)
    return optimizer
