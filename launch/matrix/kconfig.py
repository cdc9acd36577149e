"""`make menuconfig` and the defconfigs: a test matrix chosen in a menu, kept in `.config`.

The menu is launch/Kconfig. `to_matrix` turns a .config into what a matrix file holds.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

__all__ = ["DEFCONFIGS", "arguments", "is_kconfig", "load", "main", "to_matrix"]

_KCONFIG = Path(__file__).parents[1] / "Kconfig"
DEFCONFIGS = Path(__file__).parents[1] / "defconfigs"
_SPARSITIES = (50, 70, 90, 95, 99)
_OPTIMIZERS = {  # symbol -> timm's name, learning-rate symbol, weight-decay symbol
    "SGD": ("momentum", "LR_SGD", "WEIGHT_DECAY_SGD"),
    "ADAM": ("adam", "LR_ADAM", "WEIGHT_DECAY_ADAM"),
    "ADAMW": ("adamw", "LR_ADAM", "WEIGHT_DECAY_ADAMW"),
    "ADAMWADV": ("adamwadv", "LR_ADAM", "WEIGHT_DECAY_ADAMW"),
    "ADAMWSPAM": ("adamwspam", "LR_ADAM", "WEIGHT_DECAY_ADAMW"),
    "ADAMWPRUNE": ("adamwprune", "LR_ADAM", "WEIGHT_DECAY_ADAMW"),
    "SGDPRUNE": ("sgdprune", "LR_SGD", "WEIGHT_DECAY_SGD"),
}
_OURS = ("adamwprune", "sgdprune")
_HAVE_STATE = ("adam", "adamwadv", "adamwspam")  # adamw's is adamwprune itself


def is_kconfig(path: Path) -> bool:
    """Whether a matrix file is a .config or a defconfig rather than YAML."""
    return path.name.startswith(".config") or path.resolve().parent == DEFCONFIGS.resolve()


def load(path: Path) -> dict[str, str]:
    """Symbol -> value of a .config or defconfig. Raises ValueError for an unknown symbol or a value out of range."""
    import kconfiglib

    menu = kconfiglib.Kconfig(str(_KCONFIG), warn_to_stderr=False)
    menu.warn_assign_undef = True
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it with make menuconfig or make defconfig-<name>")
    menu.load_config(str(path))
    symbols = {symbol.name: symbol.str_value for symbol in menu.unique_defined_syms}  # says what is out of range
    if menu.warnings:
        raise ValueError(f"{path}: {'; '.join(menu.warnings)}; the symbols are those of launch/Kconfig")
    return symbols


def _number(symbols: dict[str, str], name: str) -> dict[str, float]:
    if not symbols[name]:
        return {}
    try:
        return {"lr" if name.startswith("LR") else "weight_decay": float(symbols[name])}
    except ValueError:
        raise ValueError(f"CONFIG_{name}={symbols[name]!r} is not a number; for example 0.001") from None


def to_matrix(symbols: dict[str, str]) -> dict[str, Any]:
    """What a matrix file of these choices holds. Raises ValueError where they make no run."""
    on = {name for name, value in symbols.items() if value == "y"}
    sparsities = [share / 100 for share in _SPARSITIES if f"SPARSITY_ENABLE_{share}" in on]
    cells: list[dict[str, Any]] = []
    per_opt: dict[str, Any] = {}
    for symbol, (opt, rate, decay) in _OPTIMIZERS.items():
        if f"OPTIMIZER_ENABLE_{symbol}" not in on:
            continue
        opt = "sgd" if symbol == "SGD" and "SGD_NESTEROV" in on else opt
        mine = _cells_of(opt, on, sparsities)
        cells += mine
        settings = _number(symbols, rate) | _number(symbols, decay)
        if mine and settings:
            per_opt[opt] = settings
    if not cells:
        raise ValueError("these choices make no run: enable an optimizer with a pruning method, and a sparsity")
    try:
        seeds = [int(seed) for seed in symbols["SEEDS"].split()]
    except ValueError:
        raise ValueError(f"CONFIG_SEEDS={symbols['SEEDS']!r} are not whole numbers with spaces between") from None
    content: dict[str, Any] = {
        "name": symbols["MATRIX_NAME"],
        "recipe": symbols["RECIPE"],
        "seeds": seeds,
        "cells": cells,
        "per_opt": per_opt,
    }
    content["jobs"] = int(symbols["JOBS"])
    if symbols["ACCELERATE_CONFIG"] != "none":
        content["accelerate_config"] = symbols["ACCELERATE_CONFIG"]
        if int(symbols["RANKS"]):
            content["ranks"] = int(symbols["RANKS"])
    return content


def _cells_of(opt: str, on: set[str], sparsities: list[float]) -> list[dict[str, Any]]:
    if opt in _OURS:
        return [{"opt": opt, "sparsity": share} for share in sparsities if "PRUNING_ENABLE_STATE" in on]
    methods: list[dict[str, Any]] = []
    for name in ("magnitude", "movement"):
        if f"PRUNING_ENABLE_{name.upper()}" in on:
            methods.append({"pruning": name})
    if "PRUNING_ENABLE_DISPLACEMENT" in on:
        methods.append({"pruning": "movement", "prune_score": "displacement"})
    if "PRUNING_STATE_ALL" in on and opt in _HAVE_STATE:
        methods.append({"pruning": "state"})
    dense = [{"opt": opt, "pruning": "none"}] if "PRUNING_ENABLE_NONE" in on else []
    return dense + [{"opt": opt, **method, "sparsity": share} for method in methods for share in sparsities]


def arguments(symbols: dict[str, str]) -> list[str]:
    """train.py's flags for every run that the menu's other choices amount to."""
    chosen = {"MODEL": "--model", "DATA_DIR": "--data-dir"}
    flags = [part for name, flag in chosen.items() if symbols[name] for part in (flag, symbols[name])]
    for name, flag in {"NUM_EPOCHS": "--epochs", "BATCH_SIZE": "--global-batch-size"}.items():
        flags += [flag, symbols[name]] if int(symbols[name]) else []
    for name, amp in {"AMP_BF16": "bf16", "AMP_FP16": "fp16"}.items():
        flags += ["--amp", amp] if symbols[name] == "y" else []
    return flags + shlex.split(symbols["EXTRA_ARGS"])


def _menu(config: Path) -> int:
    if not sys.stdin.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        names = ", ".join(sorted(path.name for path in DEFCONFIGS.iterdir()))
        print(  # noqa: T201
            "make menuconfig needs a terminal. Without one take a ready choice, make defconfig-<name> "
            f"({names}), and edit .config, whose symbols launch/Kconfig explains.",
            file=sys.stderr,
        )
        return 2
    import kconfiglib
    import menuconfig

    os.environ["KCONFIG_CONFIG"] = str(config)
    menuconfig.menuconfig(kconfiglib.Kconfig(str(_KCONFIG)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and do one of menuconfig, defconfig, list-defconfigs, savedefconfig, name."""
    parser = argparse.ArgumentParser(prog="python -m launch.matrix.kconfig", description=__doc__)
    parser.add_argument("what", choices=("menuconfig", "defconfig", "list-defconfigs", "savedefconfig", "name"))
    parser.add_argument("defconfig", nargs="?", help="name of a file in launch/defconfigs")
    parser.add_argument("--config", type=Path, default=Path(".config"), help="default %(default)s")
    options = parser.parse_args(argv)
    try:
        return _do(options)
    except ValueError as error:
        parser.exit(2, f"launch.matrix.kconfig: error: {error}\n")


def _do(options: argparse.Namespace) -> int:
    import kconfiglib

    if options.what == "menuconfig":
        return _menu(options.config)
    if options.what == "list-defconfigs":
        for path in sorted(DEFCONFIGS.iterdir()):
            print(f"{path.name:<28} {path.read_text().splitlines()[0].removeprefix('# ')}")  # noqa: T201
        return 0
    if options.what == "defconfig":
        path = DEFCONFIGS / str(options.defconfig)
        if not path.is_file():
            names = ", ".join(sorted(path.name for path in DEFCONFIGS.iterdir()))
            raise ValueError(f"no defconfig {options.defconfig}; there are {names}")
        load(path)
        menu = kconfiglib.Kconfig(str(_KCONFIG), warn_to_stderr=False)
        menu.load_config(str(path))
        menu.write_config(str(options.config))
        print(f"{options.config} is {path.name} now; make test-matrix starts it", file=sys.stderr)  # noqa: T201
        return 0
    symbols = load(options.config)
    if options.what == "savedefconfig":
        menu = kconfiglib.Kconfig(str(_KCONFIG), warn_to_stderr=False)
        menu.load_config(str(options.config))
        menu.write_min_config("defconfig")
        print("written to ./defconfig; move it to launch/defconfigs/<name> to keep it", file=sys.stderr)  # noqa: T201
    else:
        print(symbols["MATRIX_NAME"])  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
