"""Rules for layers: regular expressions on parameters' names -> `skip`, or a sparsity, pattern or score of their own.

    {"^conv1": "skip", "^layer4": 0.9, "mlp": {"pattern": "2:4"}, "head": {"sparsity": 0.5, "score": "magnitude"}}

The first that matches (anywhere in the name) is a parameter's. Those with the same options make a part, which is pruned
for itself as exactly as a whole model is; what no rule matches is pruned by the optimizer's own options.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from toolkit.prune.groups import listed, prunable_names
from toolkit.prune.patterns import CHANNEL, WEIGHT, n_of_m, sparsity_of
from toolkit.prune.schedule import Schedule

SKIP = "skip"
_KEYS = ("sparsity", "pattern", "score")

_Options = TypeVar("_Options", bound=Schedule)


def prunable_by_rules(
    model: nn.Module, rules: Mapping[str, Any] | None, pattern: str, *, ends: bool = False
) -> dict[str, dict[str, Any]]:
    """Name of each weight that pruning is for -> its own options, {} where it has none. `pattern` is the optimizer's.

    Raises ValueError for a rule that says nothing known, is never the first to match, or asks for N:M where none fits.
    """
    default = prunable_names(model, pattern, ends=ends)
    if not rules:
        return {name: {} for name in default}
    names, found = prunable_names(model), {name: dict[str, Any]() for name in default}
    left = {name: weight for name, weight in model.named_parameters() if name in names}  # no rule has matched them yet
    for rule, said in rules.items():
        own, expression = _checked(rule, said, pattern), _compiled(rule)
        taken = {name: left.pop(name) for name in list(left) if expression.search(name)}
        if not taken:
            hit = any(expression.search(name) for name in names)
            why = "rules before it take all it matches; put it first" if hit else "it matches no prunable parameter"
            raise ValueError(f"{rule!r}: {why}; these are {listed(sorted(names))}")
        for name, weight in taken.items():
            kind = None if own is None else n_of_m(own.get("pattern", WEIGHT))
            if kind is not None and not kind.fits(weight.shape):
                raise ValueError(
                    f"{rule!r}: its pattern does not fit {name} of shape {tuple(weight.shape)}; "
                    "put a rule for that before this one"
                )
            if own is None:
                found.pop(name, None)
            elif "pattern" in own or name in default:
                found[name] = own
    return found


def own_options(options: _Options, own: Mapping[str, Any]) -> _Options:
    """The options of a part: the optimizer's, with its own on top. Raises ValueError where these do not go together."""
    if own and not options.enabled:
        raise ValueError(
            "a rule asks for pruning, which sparsity 0 switches off; give a sparsity, or leave the rules out "
            f"(a last rule '.': {SKIP} prunes only what the rules before it name)"
        )
    pattern = own.get("pattern", options.pattern)
    asked = own.get("sparsity", options.sparsity if pattern == options.pattern else None)
    if asked is None and n_of_m(pattern) is None:
        raise ValueError(f"a rule with pattern {pattern} needs sparsity, for example 0.5")
    return dataclasses.replace(options, **{**own, "pattern": pattern, "sparsity": sparsity_of(pattern, asked)})


def _compiled(rule: Any) -> re.Pattern[str]:
    try:
        return re.compile(str(rule))
    except re.error as error:
        raise ValueError(f"{rule!r} is no regular expression ({error}); mend it, a dot is written \\.") from None


def _checked(rule: str, said: Any, pattern: str) -> dict[str, Any] | None:
    """A rule's options, None for skip."""
    if said == SKIP:
        return None
    own: Any = {"sparsity": said} if isinstance(said, (int, float)) else said
    if not isinstance(own, Mapping) or not own or own.keys() - set(_KEYS):
        raise ValueError(f"{rule!r}: {said!r} is not known; give {SKIP}, a sparsity, or {', '.join(_KEYS)} by name")
    if CHANNEL in (pattern, own.get("pattern")):
        raise ValueError(f"{rule!r}: channels go through all layers; with pattern {CHANNEL} a rule can only be {SKIP}")
    share = own.get("sparsity", 0.0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 <= share < 1.0:
        raise ValueError(f"{rule!r}: sparsity {share!r} must be in [0, 1)")
    n_of_m(str(own.get("pattern", pattern)))
    return dict(own) | ({"sparsity": float(share)} if "sparsity" in own else {})
