"""Memory by arithmetic: what an optimizer with its pruning must keep, to the byte, from shapes and survivors alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.prune.mask import mask_bytes
from toolkit.prune.moments import CODED_FROM, exponents_of
from toolkit.prune.spans import Spans, make_spans, num_blocks_of, num_groups_of


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter: its weights, how many survive, and whether it may be pruned and is trained at all.

    Of a shard, whose `numel` weights are a part only, `whole_numel` are all of the parameter's, and `cut` its spans.
    """

    numel: int
    prunable: bool
    survivors: int
    itemsize: int = 4
    trained: bool = True
    whole_numel: int | None = None
    cut: Spans | None = None

    @property
    def spans(self) -> Spans:
        """Where its blocks and groups begin."""
        return make_spans(self.numel, []) if self.cut is None else self.cut

    @property
    def may_be_coded(self) -> bool:
        """Whether it is large enough for 8-bit moments, and prunable."""
        return self.prunable and (self.numel if self.whole_numel is None else self.whole_numel) >= CODED_FROM

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter itself."""
        return self.numel * self.itemsize


def predict_optimizer_rows(
    parameters: Sequence[ParameterFacts],
    moments: Sequence[str],
    *,
    counts_steps: bool,
    method: str,
    score: str | None,
    state_dtype: str | None = None,
    budgeted: bool = False,
) -> dict[str, int]:
    """Ledger rows of the optimizer's state once masks exist (or with `method` none, always).

    `moments` are the parameter-sized state keys; `counts_steps` says that every parameter has a float32 step counter
    (Adam's family). `method` is none, magnitude, movement or state; `score` tells movement from displacement;
    `state_dtype` is the moments', None the parameters' own; `budgeted` that of coded parameters alone.
    """
    pruned = [one for one in parameters if one.prunable and method != "none"]
    rows = {}
    for key in moments:
        rows[f"optim.{key}"] = 0
        for one in parameters:
            kept, itemsize = one.survivors if method == "state" and one.prunable else one.numel, one.itemsize
            if state_dtype == "int8" and one.may_be_coded:
                exponents = f"optim.{exponents_of(key)}"
                rows[exponents], itemsize = rows.get(exponents, 0) + num_groups_of(one.spans), 1
            elif state_dtype is not None:
                coded = not budgeted or one.may_be_coded
                itemsize = 2 if state_dtype == "bfloat16" and coded else 4
            rows[f"optim.{key}"] += kept * itemsize
    if counts_steps:
        rows["optim.step"] = 4 * len(parameters)
    if pruned:
        rows["masks"] = sum(mask_bytes(one.numel) for one in pruned)
    if pruned and method == "state":
        rows["offsets"] = sum(4 * num_blocks_of(one.spans) for one in pruned)
    if pruned and method == "movement":
        if score == "displacement":
            rows["initial_weights"] = sum(one.nbytes for one in pruned)
        else:
            rows["scores"] = sum(one.numel * max(one.itemsize, 4) for one in pruned)
    return rows
