"""Memory by arithmetic: what an optimizer with its pruning must keep, to the byte, from shapes and survivors alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.prune.mask import mask_bytes
from toolkit.prune.packing import offset_bytes


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter: its weights, how many survive, and whether it may be pruned and is trained at all."""

    numel: int
    prunable: bool
    survivors: int
    itemsize: int = 4
    trained: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter itself."""
        return self.numel * self.itemsize


def predict_optimizer_rows(
    parameters: Sequence[ParameterFacts], moments: Sequence[str], *, counts_steps: bool, method: str, score: str | None
) -> dict[str, int]:
    """Ledger rows of the optimizer's state once masks exist (or with `method` none, always).

    `moments` are the parameter-sized state keys; `counts_steps` says that every parameter has a float32 step counter
    (Adam's family). `method` is none, magnitude, movement or state; `score` tells movement from displacement.
    """
    rows = {f"optim.{key}": 0 for key in moments}
    if counts_steps:
        rows["optim.step"] = 4 * len(parameters)
    for parameter in parameters:
        pruned = parameter.prunable and method != "none"
        kept = parameter.survivors if pruned and method == "state" else parameter.numel
        for key in moments:
            rows[f"optim.{key}"] += kept * parameter.itemsize
        if pruned:
            rows["masks"] = rows.get("masks", 0) + mask_bytes(parameter.numel)
            if method == "state":
                rows["offsets"] = rows.get("offsets", 0) + offset_bytes(parameter.numel)
            if method == "movement":
                row = "initial_weights" if score == "displacement" else "scores"
                rows[row] = rows.get(row, 0) + parameter.numel * parameter.itemsize
    return rows
