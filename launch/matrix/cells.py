"""Reads a test matrix: which runs it is made of, and the command of each.

A matrix is YAML with `name`, `recipe`, `seeds` and `cells`. A cell is a mapping of train.py settings; under `product`
it maps settings to lists, and stands for every combination; it may have `seeds` of its own. Seeds and a product's lists
may hold ranges, 0.5:0.9:0.1. `settings` holds what all cells share beyond the recipe, `per_opt` what one optimizer's
do, `jobs` how many run at a time. `accelerate_config` names the launch file, with `ranks` instead of its number of
ranks; without it train.py runs as one plain process.
"""

import argparse
import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.matrix import menu
from launch.matrix.ranges import Loader, expand, seeds_of
from launch.matrix.symbols import load as load_symbols
from launch.start import accelerate_launch
from toolkit.cli import parse
from toolkit.config import Config
from toolkit.files import check_name

_NEEDED = ("name", "recipe", "seeds", "cells")
_KEYS = (*_NEEDED, "accelerate_config", "ranks", "settings", "per_opt", "jobs")
# Settings of a cell that its short name shows already; the others follow by name.
_NAMED = {"model", "opt", "pruning", "prune_score", "sparsity", "seed"}


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
    jobs: int = 1

    def command(self, cell: Cell, runs: Path) -> list[str]:
        """The cell as one command that can be pasted."""
        place = ["--output", str(runs), "--experiment", cell.name, "--resume", "auto"]
        return [*self.launcher, "train.py", *cell.arguments, *place]


def load_matrix(path: Path, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()) -> Matrix:
    """Read a matrix file or a menu's .config. `overrides` are train.py arguments for every cell.

    Raises ValueError on an unknown key.
    """
    if menu.is_kconfig(path):
        symbols = load_symbols(path)
        return make_matrix(menu.to_matrix(symbols), str(path), seeds, [*menu.arguments(symbols), *overrides])
    try:
        content = yaml.load(path.read_text(), Loader)
    except (OSError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"matrix {path} cannot be read ({reason}); check the path, or see launch/matrices/") from None
    if not isinstance(content, dict):
        raise ValueError(f"matrix {path} is no mapping of {', '.join(_KEYS)}")
    unknown = sorted(set(content) - set(_KEYS))
    missing = sorted(set(_NEEDED) - set(content))
    if unknown or missing:
        raise ValueError(f"matrix {path}: unknown keys {unknown}, missing keys {missing}; valid: {', '.join(_KEYS)}")
    return make_matrix(content, str(path), seeds, overrides)


# The flags that name a matrix and a part of it.
SELECTION: dict[str, dict[str, Any]] = {
    "file": {"type": Path, "help": "matrix: a YAML of launch/matrices, a defconfig, or .config"},
    "--only": {"default": "*", "metavar": "GLOB", "help": "cells whose name matches"},
    "--seeds": {
        "type": seeds_of,
        "nargs": "+",
        "metavar": "SEED",
        "help": "instead of the file's; 35:94:1 is 35 to 94",
    },
    "--model": {"help": "instead of the recipe's"},
    "--epochs": {"type": int, "help": "instead of the recipe's"},
    "--data-dir": {"help": "instead of the recipe's"},
}


def selected(options: argparse.Namespace) -> tuple[Matrix, list[Cell]]:
    """The matrix and those of its cells that the flags choose. Raises ValueError where there are none."""
    given = {"--model": options.model, "--epochs": options.epochs, "--data-dir": options.data_dir}
    overrides = [part for flag, value in given.items() if value is not None for part in (flag, str(value))]
    matrix = load_matrix(options.file, options.seeds and list(itertools.chain(*options.seeds)), overrides)
    cells = [cell for cell in matrix.cells if fnmatch.fnmatch(cell.name, options.only)]
    if not cells:
        first = ", ".join(cell.name for cell in matrix.cells[:3])
        raise ValueError(
            f"--only {options.only} matches none of {len(matrix.cells)} cells, the first {first}; --dry-run lists all"
        )
    return matrix, cells


def make_matrix(
    content: dict[str, Any], source: str, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Matrix:
    """The matrix of a file's content. Raises ValueError where two cells are the same."""
    per_opt = content.get("per_opt", {})
    cells = [
        (settings, seeds if seeds is not None else expand(entry.get("seeds", content["seeds"])))
        for entry in content["cells"]
        for settings in _expand(entry)
    ]
    strangers = sorted(set(per_opt) - {settings.get("opt") for settings, _ in cells})
    if strangers:
        raise ValueError(f"matrix {source}: per_opt names {', '.join(strangers)}, which no cell trains with")

    def cell(settings: dict[str, Any], seed: int) -> Cell:
        merged = {**content.get("settings", {}), **per_opt.get(settings.get("opt"), {}), **settings}
        flags = [part for key, value in merged.items() for part in _flag(key.replace("_", "-"), value)]
        arguments = ("-c", content["recipe"], *flags, *overrides, "--seed", str(seed))
        config = parse(arguments, prog=f"{source} cell {settings}")
        return Cell(_name(config, settings), arguments, config)

    every_seed = dict.fromkeys(seed for _, own in cells for seed in own)
    found = [cell(settings, seed) for seed in every_seed for settings, own in cells if seed in own]
    check_name(content["name"], f"matrix {source}: name")
    names = [check_name(cell.name, f"matrix {source}: cell") for cell in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"matrix {source}: two cells are the same, {twice[0]}; take one out")
    if "ranks" in content and not content.get("accelerate_config"):
        raise ValueError(f"matrix {source}: ranks={content['ranks']} needs an accelerate_config; name a launch file")
    if int(content.get("jobs", 1)) < 1:
        raise ValueError(f"matrix {source}: jobs={content['jobs']} must be at least 1")
    file = content.get("accelerate_config")
    launcher = accelerate_launch(file, ranks=content.get("ranks")) if file else ["python"]
    return Matrix(content["name"], tuple(launcher), tuple(found), int(content.get("jobs", 1)))


def _expand(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rest = {key: value for key, value in entry.items() if key not in ("product", "seeds")}
    product = {key: expand(values) for key, values in entry.get("product", {}).items()}
    for values in itertools.product(*product.values()):
        yield {**rest, **dict(zip(product, values, strict=True))}


def _flag(name: str, value: Any) -> list[str]:
    """A setting as arguments of train.py."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = [f"{part}={entry}" for part, entry in value.items()] if isinstance(value, dict) else value
    return [f"--{name}", *map(str, values if isinstance(values, list) else [values])]


def _name(config: Config, settings: dict[str, Any]) -> str:
    """<model>_<opt>_<pruning>[_<sparsity %>][_<the cell's other settings>]_seed<N>, whatever other cells there are.

    What the recipe, settings, per_opt or the command line set is not in it: it goes for every cell of the optimizer.
    """
    from toolkit.optim.registry import find_spec

    spec = find_spec(config.opt)
    method = config.pruning or ("state" if spec and spec.is_ours else "none")
    score = f"-{config.prune_score}" if config.prune_score else ""
    share = f"_{100 * config.sparsity:g}" if config.sparsity else ""
    more = "".join(f"_{key.replace('_', '-')}={_text(settings[key])}" for key in sorted(settings.keys() - _NAMED))
    return f"{config.model}_{config.opt}_{method}{score}{share}{more}_seed{config.seed}".replace("/", "-")


def _text(value: Any) -> str:
    """A setting's value as a part of a folder's name."""
    if isinstance(value, dict):
        return ",".join(f"{key}={_text(entry)}" for key, entry in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
