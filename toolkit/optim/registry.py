"""All optimizer names and how they enter timm's factory; the only file that imports timm's private registry.

Names use hyphens: timm splits on `_` and silently drops what stands before it.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers
from timm.optim._optim_factory import OptimInfo, default_registry

from toolkit.optim.adamwadv import RECIPE as ADAMWADV_RECIPE
from toolkit.optim.adamwadv import AdamWAdv
from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.adamwspam import AdamWSPAM
from toolkit.optim.packed import PackedOptimizer
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.hooks import HOOK_METHODS, pruned_by_hooks

METHODS = ("none", "magnitude", "movement", "state")
_ADAM = ("exp_avg", "exp_avg_sq")
_AMSGRAD = (*_ADAM, "max_exp_avg_sq")
_SGD = ("momentum_buffer",)
_TIMMS = {
    "sgd": ("SGD with Nesterov momentum", _SGD),
    "momentum": ("SGD with classical momentum", _SGD),
    "adam": ("Adam", _ADAM),
    "adamw": ("AdamW", _ADAM),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(OptimInfo):
    """One name of ours in timm's factory.

    `base` and `method` say what it is made of, `moments` the parameter-sized state keys (for the memory arithmetic),
    `recipe` the train.py settings that belong to it unless a flag says otherwise.
    """

    base: str
    method: str
    moments: tuple[str, ...]
    has_betas: bool = True
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def counts_steps(self) -> bool:
        """Whether each parameter has a step counter in its state."""
        return self.method == "state" or "exp_avg" in self.moments

    @property
    def family(self) -> str:
        """Whose update rule it is at heart: SGD or Adam."""
        return "SGD" if self.base in ("sgd", "momentum") else "Adam"

    @property
    def keeps_state_dtype(self) -> bool:
        """Whether it takes a `state_dtype` for its moments, and with one rounds bfloat16 weights by chance."""
        kind = self.opt_class
        return self.method in ("none", "state") and isinstance(kind, type) and issubclass(kind, PackedOptimizer)

    @property
    def is_ours(self) -> bool:
        """Whether it is one of the optimizers made for pruning by state, under its own name: adamwprune, sgdprune."""
        return self.method == "state" and "-" not in self.name


def _state_spec(base: str, opt_class: Any, what: str, moments: tuple[str, ...], **rest: Any) -> OptimizerSpec:
    description = f"{what} pruned by its own moments, kept packed for the survivors"
    return OptimizerSpec(f"{base}-state", opt_class, description, base=base, method="state", moments=moments, **rest)


def _base_specs() -> list[OptimizerSpec]:
    stock = [
        OptimizerSpec(
            **{**vars(get_optimizer_info(name)), "description": f"{what} (timm's)"},
            base=name,
            method="none",
            moments=moments,
        )
        for name, (what, moments) in _TIMMS.items()
    ]
    return [
        *stock,
        OptimizerSpec(
            "adamwadv",
            AdamWAdv,
            "AdamW with AMSGrad; its recipe adds gradient clipping at 1.0 and a cosine schedule",
            base="adamwadv",
            method="none",
            moments=_AMSGRAD,
            recipe=ADAMWADV_RECIPE,
        ),
        OptimizerSpec(
            "adamwspam",
            AdamWSPAM,
            "Adam with spike-aware clipping and momentum reset (SPAM), decoupled weight decay",
            base="adamwspam",
            method="none",
            moments=_ADAM,
        ),
    ]


@functools.cache
def specs() -> tuple[OptimizerSpec, ...]:
    """Every name of ours, and the four of timm's they build on, bases first."""
    bases = _base_specs()
    state = [
        OptimizerSpec(
            "adamwprune",
            AdamWPrune,
            "AdamW pruned by its own moments, kept packed for the survivors",
            base="adamw",
            method="state",
            moments=_ADAM,
        ),
        OptimizerSpec(
            "sgdprune",
            SGDPrune,
            "SGD (Nesterov) pruned by weight or momentum, kept packed for the survivors",
            base="sgd",
            method="state",
            moments=_SGD,
            has_eps=False,
            has_betas=False,
            has_momentum=True,
            defaults={"nesterov": True},
        ),
        _state_spec("adam", AdamWPrune, "Adam", _ADAM, defaults={"decoupled_weight_decay": False}),
        _state_spec("adamw", AdamWPrune, "adamwprune by its systematic name: AdamW", _ADAM),
        _state_spec(
            "adamwadv", AdamWPrune, "AdamW with AMSGrad", _AMSGRAD, defaults={"amsgrad": True}, recipe=ADAMWADV_RECIPE
        ),
        _state_spec("adamwspam", AdamWSPAM, "SPAM", _ADAM),
    ]
    hooked = [
        dataclasses.replace(
            base,
            name=f"{base.name}-{method}",
            opt_class=pruned_by_hooks(base.opt_class, method),  # type: ignore[arg-type]  # torch's odd __hash__
            description=f"{base.name} with {method} pruning",
            method=method,
        )
        for base in bases
        for method in HOOK_METHODS
    ]
    return (*bases, *state, *hooked)


def register_all() -> None:
    """Put our names into timm's factory. Idempotent; refuses to replace a name that somebody else registered."""
    known = set(list_optimizers())
    for spec in specs():
        if spec.name in _TIMMS:
            continue
        assert "_" not in spec.name, spec.name
        if spec.name in known:
            if get_optimizer_info(spec.name).description == spec.description:
                continue
            raise ValueError(f"optimizer name {spec.name!r} is taken in timm's registry; another package registered it")
        default_registry.register(spec)


def find_spec(name: str) -> OptimizerSpec | None:
    """Our row for a name, or None for one of timm's other optimizers."""
    return next((spec for spec in specs() if spec.name == name), None)


def resolve_name(opt: str, pruning: str | None) -> tuple[str, str]:
    """(`--opt`, `--pruning`) -> (name in the factory, pruning method in force). Raises ValueError where they clash.

    `pruning=None` means the flag was not given: the method is then the name's own. `none` with a state-pruned name
    keeps the optimizer and switches its pruning off.
    """
    opt = opt.lower()
    spec = find_spec(opt.removeprefix("lookahead_"))
    own = spec.method if spec else "none"
    if pruning is None or pruning == own:
        return opt, own
    if own != "none":
        if pruning == "none":
            return opt, "none"
        raise ValueError(f"--opt {opt} prunes by {own}, --pruning {pruning} asks for another method; drop one of them")
    combined = f"{opt}-{pruning}"
    if find_spec(combined.removeprefix("lookahead_")) is None:
        bases = sorted(spec.base for spec in specs() if spec.method == pruning and "-" in spec.name)
        raise ValueError(f"--pruning {pruning} is not offered for --opt {opt}; choose one of {', '.join(bases)}")
    return combined, pruning


def check_optimizer_name(name: str) -> None:
    """Raise ValueError, with close names, unless timm's factory knows `name` and does not drop a part of it."""
    prefix, _, last = name.rpartition("_")
    known = [str(entry) for entry in list_optimizers()]
    if last in known and prefix in ("", "lookahead"):
        return
    import difflib

    near = difflib.get_close_matches(name.replace("_", "-"), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"--opt {name} is not known.{hint} Known: {', '.join(sorted(known))}")
