"""What may be pruned: the prunable parameters of an optimizer, in a fixed order and with names for messages."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["prunable_parameters"]


def _is_weight_matrix(parameter: Tensor) -> bool:
    # A leading dimension of 1 leaves out class tokens and position embeddings.
    return parameter.ndim > 1 and parameter.shape[0] > 1


def prunable_parameters(param_groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """(name, parameter) of all prunable parameters, in the order of the groups.

    Groups that carry a `prunable` mark decide by it. Where no group does (timm's own train.py), every parameter with
    more than one dimension and a leading dimension above 1 is prunable.
    """
    groups = list(param_groups)
    marked = any("prunable" in group for group in groups)
    found = []
    position = 0
    for group in groups:
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            name = names[index] if names else f"parameter {position} of shape {tuple(parameter.shape)}"
            position += 1
            if bool(group.get("prunable", False)) if marked else _is_weight_matrix(parameter):
                found.append((name, parameter))
    return found
