"""Reads a test matrix: which runs it is made of, and the command of each.

A matrix is YAML with `name`, `recipe`, `seeds` and `cells`. A cell is a mapping of train.py settings; under `product`
it maps settings to lists, and stands for every combination; it may have `seeds` of its own. `per_opt` holds settings of
one optimizer's cells.
`accelerate_config` names the launch file, with `ranks` instead of its number of ranks; without it train.py runs as one
plain process.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import kconfig
from toolkit.config import Config, parse

__all__ = ["Cell", "Matrix", "load_matrix"]

_NEEDED = ("name", "recipe", "seeds", "cells")
_KEYS = (*_NEEDED, "accelerate_config", "ranks", "per_opt")
# Settings that the name of every run shows; where cells differ in others, these follow.
_NAMED = {"model", "opt", "pruning", "sparsity", "seed"}


@dataclass(frozen=True)
class Cell:
    """One training run of a matrix: its name, train.py's arguments, and the settings these amount to."""

    name: str
    arguments: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Matrix:
    """A matrix as read from its file, with the cells of all seeds."""

    name: str
    launcher: tuple[str, ...]
    cells: tuple[Cell, ...]

    def command(self, cell: Cell, runs: Path) -> list[str]:
        """The cell as one command that can be pasted."""
        place = ["--output", str(runs), "--experiment", cell.name, "--resume", "auto"]
        return [*self.launcher, "train.py", *cell.arguments, *place]


def load_matrix(path: Path, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()) -> Matrix:
    """Read a matrix file or a menu's .config. `overrides` are train.py arguments for every cell.

    Raises ValueError on an unknown key.
    """
    if kconfig.is_kconfig(path):
        symbols = kconfig.load(path)
        return make_matrix(kconfig.to_matrix(symbols), str(path), seeds, [*kconfig.arguments(symbols), *overrides])
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"matrix {path} cannot be read ({' '.join(str(error).split())}); check the path") from None
    if not isinstance(content, dict):
        raise ValueError(f"matrix {path} is no mapping of {', '.join(_KEYS)}")
    unknown = sorted(set(content) - set(_KEYS))
    missing = sorted(set(_NEEDED) - set(content))
    if unknown or missing:
        raise ValueError(f"matrix {path}: unknown keys {unknown}, missing keys {missing}; valid: {', '.join(_KEYS)}")
    return make_matrix(content, str(path), seeds, overrides)


def make_matrix(
    content: dict[str, Any], source: str, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Matrix:
    """The matrix of a file's content. Raises ValueError where two cells are the same."""
    per_opt = content.get("per_opt", {})
    cells = [
        (settings, seeds if seeds is not None else entry.get("seeds", content["seeds"]))
        for entry in content["cells"]
        for settings in _expand(entry)
    ]
    strangers = sorted(set(per_opt) - {settings.get("opt") for settings, _ in cells})
    if strangers:
        raise ValueError(f"matrix {source}: per_opt names {', '.join(strangers)}, which no cell trains with")
    found: list[tuple[list[str], Config]] = []
    for seed in dict.fromkeys(seed for _, own in cells for seed in own):
        for settings, own in cells:
            if seed not in own:
                continue
            merged = {**per_opt.get(settings.get("opt"), {}), **settings}
            arguments = ["-c", content["recipe"], *_arguments(merged), *overrides, "--seed", str(seed)]
            found.append((arguments, parse(arguments, prog=f"{source} cell {settings}")))
    names = _names([config for _, config in found], source)
    launcher = ["python"]
    if content.get("accelerate_config"):
        launcher = ["accelerate", "launch", "--config_file", content["accelerate_config"]]
        launcher += ["--num_processes", str(content["ranks"])] if "ranks" in content else []
    return Matrix(
        content["name"], tuple(launcher),
        tuple(Cell(name, tuple(a), config) for name, (a, config) in zip(names, found, strict=True)),
    )  # fmt: skip


def _expand(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rest = {key: value for key, value in entry.items() if key not in ("product", "seeds")}
    product = entry.get("product", {})
    for values in itertools.product(*product.values()):
        yield {**rest, **dict(zip(product, values, strict=True))}


def _arguments(settings: dict[str, Any]) -> list[str]:
    arguments = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is False:
            arguments.append("--no-" + key.replace("_", "-"))
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif isinstance(value, dict):
            arguments += [flag, *(f"{name}={entry}" for name, entry in value.items())]
        else:
            arguments += [flag, str(value)]
    return arguments


def _names(configs: Sequence[Config], source: str) -> list[str]:
    """<model>_<opt>_<pruning>[_<sparsity %>][_<other settings>]_seed<N>: others where cells of one name differ in them.

    An optimizer's own settings (per_opt) are not others: they go with its name.
    """
    short = [_short_name(config) for config in configs]
    names = []
    for config, name in zip(configs, short, strict=True):
        rivals = [other for other, theirs in zip(configs, short, strict=True) if theirs == name]
        mine = config.to_dict()
        differing = sorted(key for key in mine.keys() - _NAMED if any(r.to_dict()[key] != mine[key] for r in rivals))
        more = "".join(f"_{key.replace('_', '-')}={mine[key]}".replace("/", "-") for key in differing)
        names.append(f"{name}{more}_seed{config.seed}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"matrix {source}: two cells are the same, {twice[0]}; take one out")
    return names


def _short_name(config: Config) -> str:
    method = config.pruning or ("state" if config.opt in ("adamwprune", "sgdprune") else "none")
    score = f"-{config.prune_score}" if config.prune_score else ""
    share = f"_{100 * config.sparsity:g}" if config.sparsity else ""
    return f"{config.model}_{config.opt}_{method}{score}{share}"
