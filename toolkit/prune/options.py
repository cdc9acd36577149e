"""The pruning options: one frozen, checked record for constructors, flags and messages.

Constructors of optimizers stay flat (timm hands them keyword arguments), `**pruning: Unpack[PruningKeywords]`, of which
a PruningOptions is made at once: a Schedule, which says when, and what says how. A new option is a field here and a
line in PruningKeywords.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from toolkit.kernels.choice import IMPLEMENTATIONS
from toolkit.prune.budget import check_budget
from toolkit.prune.distribution import SCOPES
from toolkit.prune.moments import STATE_DTYPES
from toolkit.prune.patterns import CHANNEL, WEIGHT, sparsity_of
from toolkit.prune.schedule import Schedule
from toolkit.prune.scores import check_score


class PruningKeywords(TypedDict, total=False):
    """The fields of PruningOptions as keyword arguments of a constructor."""

    sparsity: float | None
    begin_step: int
    end_step: int | None
    frequency: int
    pattern: str
    score: str | None
    scope: str
    channel_multiple: int
    regrow: float
    state_dtype: str | None
    state_budget: float | str | None
    implementation: str


@dataclass(frozen=True, kw_only=True)
class PruningOptions(Schedule):
    """How an optimizer prunes. Steps are optimizer steps. Raises ValueError on a value out of range.

    sparsity: final share of zeros among the prunable weights, in [0, 1); 0 switches pruning off. Left out, or None
        in a constructor, it is 0, or what the pattern says.
    begin_step, end_step: first and last mask update; sparsity > 0 needs end_step.
    frequency: steps between mask updates.
    pattern: what goes together: weight, N:M as 2:4, or channel (toolkit.prune.patterns).
    score: what a weight is worth (toolkit.prune.scores); None is the optimizer's first.
    scope: where weights compete: global, layer or erk; channels: global, or layer, each giving the same share of them.
    channel_multiple: with pattern channel each layer keeps a multiple of so many channels, or all where it has fewer.
    regrow: share of the survivors that make way for pruned weights with the largest gradients, decayed by a cosine.
    state_dtype: of the moments: float32, bfloat16 with stochastic rounding, or int8, which is for prunable parameters
        from 4,096 weights on (toolkit.kernels.narrow; the rest float32); None is the parameter's own. With one, or with
        a budget, bfloat16 weights too are computed with in float32 and rounded by chance; without as torch does.
    state_budget: instead of one dtype the widest that fits into so many bytes a prunable weight, or `auto`, decided
        anew when masks change (toolkit.prune.budget).
    implementation: auto, reference, native or triton. On a GPU auto is the reference, many launches a tensor, for
        float16 parameters and for those with gaps in memory.
    """

    score: str | None = None
    scope: str = "global"
    channel_multiple: int = 1
    regrow: float = 0.0
    state_dtype: str | None = None
    state_budget: float | str | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        for name, valid in (("scope", SCOPES), ("state_dtype", STATE_DTYPES), ("implementation", IMPLEMENTATIONS)):
            value = getattr(self, name)
            if value not in valid and not (name == "state_dtype" and value is None):
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(valid)}")
        if self.state_budget is not None and self.state_dtype is not None:
            raise ValueError(
                f"state_budget={self.state_budget} chooses the dtype of the moments, state_dtype={self.state_dtype!r} "
                "fixes it; give one of them"
            )
        object.__setattr__(self, "state_budget", check_budget(self.state_budget))
        if not 0.0 <= self.regrow < 1.0:
            raise ValueError(f"regrow={self.regrow} is a share of the survivors; use 0 (off) to below 1")
        super().__post_init__()
        multiple = self.channel_multiple
        if not isinstance(multiple, int) or multiple < 1 or (self.enabled and multiple > 1 and self.pattern != CHANNEL):
            raise ValueError(
                f"channel_multiple={multiple} with pattern={self.pattern!r}: it is 1 (off), and with pattern="
                f"{CHANNEL!r} any whole number above; leave it out, or give for example 8"
            )
        if self.pattern == CHANNEL and (self.regrow or self.scope == "erk"):
            raise ValueError(
                f"pattern={CHANNEL!r} brings nothing back, and erk is for shapes of single weights; leave out regrow, "
                "and choose scope global or layer"
            )

    @classmethod
    def of(
        cls,
        keywords: Mapping[str, Any],
        *,
        scores: tuple[str, ...],
        implementations: tuple[str, ...] = ("auto", "reference"),
    ) -> "PruningOptions":
        """Options of an optimizer that knows `scores` (the first is its default) and has `implementations`.

        Raises TypeError that lists the options for a stranger, ValueError for a value that this optimizer lacks.
        """
        strangers = sorted(keywords.keys() - set(OPTION_NAMES))
        if strangers:
            raise TypeError(f"{strangers[0]!r} is no option; the pruning options are {', '.join(OPTION_NAMES)}")
        sparsity = sparsity_of(keywords.get("pattern", WEIGHT), keywords.get("sparsity"))
        options = cls(**{**keywords, "sparsity": sparsity, "score": keywords.get("score") or scores[0]})
        check_score(str(options.score), scores)
        if options.implementation not in implementations:
            raise ValueError(
                f"implementation={options.implementation!r} is not known; choose one of {', '.join(implementations)}"
            )
        return options


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(PruningOptions))
