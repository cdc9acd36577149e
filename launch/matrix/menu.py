"""The menu's choices (launch/Kconfig, `.config`, defconfigs) as what a matrix file holds."""

import itertools
import shlex
from pathlib import Path
from typing import Any

from launch.matrix.ranges import expand
from launch.start import ROOT

DEFCONFIGS = ROOT / "launch" / "defconfigs"
_SPARSITIES = (50, 70, 90, 95, 99)
# In the order of the runs.
_OPTIMIZERS = {
    "SGD": "momentum",
    **{opt.upper(): opt for opt in ("adam", "adamw", "adamwadv", "adamwspam", "adamwprune", "sgdprune")},
}


def is_kconfig(path: Path) -> bool:
    """Whether a matrix file is a .config or a defconfig rather than YAML."""
    return path.name.startswith(".config") or path.resolve().parent == DEFCONFIGS.resolve()


def defconfig_names() -> list[str]:
    """The ready choices."""
    return sorted(path.name for path in DEFCONFIGS.iterdir())


def to_matrix(symbols: dict[str, str]) -> dict[str, Any]:
    """What a matrix file of these choices holds. Raises ValueError where they make no run."""
    on = {name for name, value in symbols.items() if value == "y"}
    sparsities = [share / 100 for share in _SPARSITIES if f"SPARSITY_ENABLE_{share}" in on]
    sparsities = list(dict.fromkeys(sparsities + _numbers_of("SPARSITIES", symbols, float)))
    names = _OPTIMIZERS | ({"SGD": "sgd"} if "SGD_NESTEROV" in on else {})
    chosen = [opt for symbol, opt in names.items() if f"OPTIMIZER_ENABLE_{symbol}" in on]
    cells = {opt: _cells_of(opt, on, sparsities) for opt in chosen}
    rates = {opt: _rates_of(opt, symbols) for opt in chosen}
    if not any(cells.values()):
        raise ValueError("these choices make no run: enable an optimizer with a pruning method, and a sparsity")
    content: dict[str, Any] = {
        "name": symbols["MATRIX_NAME"],
        "recipe": symbols["RECIPE"],
        "seeds": _numbers_of("SEEDS", symbols, int),
        "cells": list(itertools.chain(*cells.values())),
        "per_opt": {opt: settings for opt, settings in rates.items() if settings and cells[opt]},
        "jobs": int(symbols["JOBS"]),
    }
    if symbols["ACCELERATE_CONFIG"] != "none":
        content["accelerate_config"] = symbols["ACCELERATE_CONFIG"]
        content |= {"ranks": int(symbols["RANKS"])} if int(symbols["RANKS"]) else {}
    return content


def _numbers_of(name: str, symbols: dict[str, str], kind: type[float]) -> list[Any]:
    """The numbers of a text, and of the ranges in it."""
    try:
        return [kind(str(number)) for number in expand(symbols[name].split())]
    except ValueError as error:
        numbers = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"CONFIG_{name}={symbols[name]!r} are not {numbers} or ranges with spaces between: {error}"
        ) from None


def _rates_of(opt: str, symbols: dict[str, str]) -> dict[str, float]:
    """The optimizer's learning rate and weight decay, where the menu has them."""
    from toolkit.optim.registry import find_spec

    spec = find_spec(opt)
    assert spec is not None, opt
    sgd = spec.family == "SGD"
    decay = "SGD" if sgd else "ADAM" if opt == "adam" else "ADAMW"
    found: dict[str, float] = {}
    for setting, name in (("lr", f"LR_{'SGD' if sgd else 'ADAM'}"), ("weight_decay", f"WEIGHT_DECAY_{decay}")):
        try:
            found |= {setting: float(symbols[name])} if symbols[name] else {}
        except ValueError:
            raise ValueError(f"CONFIG_{name}={symbols[name]!r} is not a number; for example 0.001") from None
    return found


def _cells_of(opt: str, on: set[str], sparsities: list[float]) -> list[dict[str, Any]]:
    from toolkit.optim.registry import find_spec, specs

    ours = {spec.name: spec.base for spec in specs() if spec.is_ours}
    kept: list[dict[str, Any]] = [{}, {"state_dtype": "float32"}] if "PRUNING_STATE_FLOAT32" in on else [{}]
    goals: list[dict[str, Any]] = [{"sparsity": share} for share in sparsities]
    if "PRUNING_PATTERN_2_4" in on:
        goals.append({"prune_pattern": "2:4"})
    if "PRUNING_PATTERN_CHANNEL" in on:
        scopes: list[dict[str, Any]] = [{}, {"prune_scope": "layer"}] if "PRUNING_CHANNEL_LAYER" in on else [{}]
        goals += [{"prune_pattern": "channel", "sparsity": share, **scope} for share in sparsities for scope in scopes]
    if opt in ours:
        return [{"opt": opt, **goal, **moments} for goal in goals if "PRUNING_ENABLE_STATE" in on for moments in kept]
    offered = {
        "MAGNITUDE": {"pruning": "magnitude"},
        "MOVEMENT": {"pruning": "movement"},
        "DISPLACEMENT": {"pruning": "movement", "prune_score": "displacement"},
    }
    methods = [settings for name, settings in offered.items() if f"PRUNING_ENABLE_{name}" in on]
    # adamw's pruning by state is adamwprune itself.
    if "PRUNING_STATE_ALL" in on and opt not in ours.values() and find_spec(f"{opt}-state"):
        methods += [{"pruning": "state", **moments} for moments in kept]
    dense = [{"opt": opt, "pruning": "none"}] if "PRUNING_ENABLE_NONE" in on else []
    return dense + [{"opt": opt, **method, **goal} for method in methods for goal in goals]


def arguments(symbols: dict[str, str]) -> list[str]:
    """train.py's flags for every run that the menu's other choices amount to."""
    given = (
        ("--model", symbols["MODEL"]),
        ("--data-dir", symbols["DATA_DIR"]),
        ("--epochs", symbols["NUM_EPOCHS"]),
        ("--global-batch-size", symbols["BATCH_SIZE"]),
        ("--amp", "bf16" if symbols["AMP_BF16"] == "y" else ""),
        ("--amp", "fp16" if symbols["AMP_FP16"] == "y" else ""),
    )
    flags = [part for flag, value in given if value.strip("0") for part in (flag, value)]  # 0: not chosen
    return flags + shlex.split(symbols["EXTRA_ARGS"])
