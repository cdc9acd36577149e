"""The command line and YAML recipes -> Config; an unknown flag or key is an error that names the nearest."""

import argparse
import ast
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from toolkit.config import Config, flags
from toolkit.files import shipped_folder
from toolkit.flag import flag_name
from toolkit.timm_flags import IDLE, NOT_OFFERED

_BATCH = {"batch_size", "global_batch_size", "auto_batch_size"}
_NOT_OFFERED_FLAGS = {flag_name(name): reason for name, (_, reason) in NOT_OFFERED.items()}


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, said by the first rank of a host."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # a mistake all ranks share
            time.sleep(3)  # the first that ends has its launcher end the others, perhaps before the line is out
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # values may hold line ends


class _KeyValues(argparse.Action):
    """`key=value ...` -> dict; values are Python literals where they can be, strings else (as timm's ParseKwargs)."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        pairs = {}
        for text in values:
            key, equals, value = text.partition("=")
            if not equals:
                parser.error(f"{option_string} {text!r} is not key=value")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


class _LaunchFiles(argparse.Action):
    """Prints the folder of the launch files, which an installed toolkit keeps among its modules."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(shipped_folder("accelerate_configs"))  # noqa: T201  for $(...)
        parser.exit()


def _build_parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train an image model on WebDataset shards with an optimizer that may prune. "
        "Start it with: accelerate launch --config_file accelerate_configs/<machine>.yaml train.py <flags>",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="recipe: YAML of the settings below, or a shipped one's")
    parser.add_argument("--launch-files", action=_LaunchFiles, nargs=0, help="print where accelerate's files are, exit")
    group: Any = parser
    for item in flags():
        meta = item.metadata
        if "group" in meta:
            group = parser.add_argument_group(meta["group"])
        default = meta["default"]
        names = [flag_name(item.name), *([meta["short"]] if "short" in meta else [])]
        shown = f" (default {default})" if default not in (None, "", False) and default != {} else ""
        options: dict[str, Any] = {"dest": item.name, "help": meta["help"].replace("%", "%%") + shown}
        if meta["kind"] is bool:
            negatable = not item.name.startswith("no_")
            options["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
        elif isinstance(default, dict):
            options |= {"action": _KeyValues, "nargs": meta["nargs"], "metavar": "KEY=VALUE"}
        else:
            options |= {key: meta[key] for key in ("nargs", "const", "choices") if key in meta}
            options["type"] = meta["kind"]
            if "choices" in meta:
                options["choices"] = [choice for choice in meta["choices"] if choice != "default"]
                if "const" in meta:  # argparse would refuse its own const; __post_init__ checks the value
                    options["metavar"] = "{" + ",".join(options.pop("choices")) + "}"
            else:
                options["metavar"] = options["type"].__name__.upper()
        group.add_argument(*names, **options)
        if "const" in meta:  # where a recipe turns it on
            switch: dict[str, Any] = {"dest": item.name, "action": "store_const", "const": None}
            group.add_argument(flag_name(f"no_{item.name}"), help=f"no {names[0]}, whatever a recipe says", **switch)
    for name, (has_value, _) in IDLE.items():
        idle: dict[str, Any] = {} if has_value else {"action": "store_true"}
        parser.add_argument(flag_name(name), help=argparse.SUPPRESS, **idle)
    return parser


def _read_recipe(path: str, notes: list[str]) -> dict[str, Any]:
    """The settings of a recipe; `notes` is told what a timm run's leave out."""
    shipped = {file.name: file for file in sorted(shipped_folder("recipes").glob("*.yaml"))}
    file = Path(path)
    known_ones = f", or take a shipped recipe: {', '.join(shipped)}"
    settings = _read_yaml("-c", path, file if file.exists() else shipped.get(path, file), known_ones)
    if settings.keys() & (IDLE.keys() | NOT_OFFERED.keys()):
        settings = _of_timm(settings, path, notes)
    known = {item.name: item for item in flags()}
    result = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{key!r} in {path} is not a setting.{_near(name, known)} Valid: {', '.join(known)}")
        result[name] = _checked(known[name], value, path)
    return result


def _read_yaml(flag: str, path: str, file: Path, or_else: str = "") -> dict[str, Any]:
    """What a flag's YAML file holds. Raises ValueError where it cannot be read or is no mapping."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag} {path} cannot be read ({reason}); check the path{or_else}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{flag} {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path} must hold settings as key: value")
    return content


def _of_timm(settings: dict[str, Any], path: str, notes: list[str]) -> dict[str, Any]:
    """The args.yaml of a timm run in our words. Raises ValueError for what it did and is not offered here."""
    for key, (neutral, reason) in NOT_OFFERED.items():
        if settings.get(key, neutral) != neutral:
            raise ValueError(
                f"{key}: {settings[key]!r} in {path} is timm's and not offered here: {reason}; take the line out to "
                "train without it (docs/timm.md)"
            )
    # None, and an empty folder, are timm's words for the default; its --amp is a switch beside --amp-dtype.
    absent = {"amp_dtype"} if not settings.get("amp") else set()
    absent |= {key for key, value in settings.items() if value is None or (key, value) == ("output", "")}
    absent |= {"amp"} if settings.get("amp") is False else set()
    strange = IDLE.keys() | NOT_OFFERED.keys() | {"data", "local_rank"}
    ours = {key: value for key, value in settings.items() if key not in absent | strange}
    if settings.get("data"):  # as timm: the folder without a flag
        ours.setdefault("data_dir", settings["data"])
    left_out = sum(key in settings for key in strange)
    notes.append(
        f"-c {path} is of a timm run: {len(ours)} settings are taken, {left_out} that are not offered here left out, "
        "for timm's values change nothing (docs/timm.md)"
    )
    return ours


def _checked(item: dataclasses.Field[Any], value: Any, path: str) -> Any:
    """A recipe's value in the type of its field; 1e-3 and 1 are good floats, True is a good bool only."""
    meta = item.metadata
    many = isinstance(meta.get("nargs"), int) or meta.get("nargs") == "+"
    if value is None and meta["default"] is None:
        return None
    try:
        if "in_file" in meta and isinstance(value, dict):
            return value
        if many:
            return [_scalar(meta["kind"], entry) for entry in ([value] if isinstance(value, str) else value)]
        return _scalar(meta["kind"], meta["const"] if value is True and "const" in meta else value)
    except (TypeError, ValueError):
        kind = f"{'a list of ' if many else ''}{meta['kind'].__name__}"
        # YAML takes 2:4 for a number to the base of 60, and so for 124.
        remedy = "; put it in quotes" if meta["kind"] is str and isinstance(value, (int, float)) else ""
        raise ValueError(f"{item.name}: {value!r} in {path} must be {kind}{remedy}") from None


def _scalar(kind: type, value: Any) -> Any:
    if isinstance(value, bool) and kind is not bool:
        raise TypeError
    if kind is float and isinstance(value, (int, float, str)):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(kind, type):
        return kind(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def parse(argv: Sequence[str] | None = None, prog: str = "train.py") -> Config:
    """Command line (and recipe) -> Config. Prints one line and exits with 2 on a mistake."""
    parser = _build_parser(prog)
    known, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        if unknown:
            valid = [flag_name(item.name) for item in flags()]
            name = unknown[0].partition("=")[0]
            if reason := _NOT_OFFERED_FLAGS.get(name):
                raise ValueError(f"{name} is timm's and not offered here: {reason}; see docs/timm.md")
            if "/" in name or Path(name).is_dir():  # as timm's train.py takes it, without a flag
                raise ValueError(f"{name} is not a flag of {prog}; if it is the data folder, give --data-dir {name}")
            raise ValueError(f"{unknown[0]} is not a flag of {prog}.{_near(name, valid)} Valid: {' '.join(valid)}")
        explicit = vars(known)
        recipe = explicit.pop("config", None)
        idle = [name for name in IDLE if explicit.pop(name, None) is not None]
        notes = [f"{flag_name(name)} changes nothing: {IDLE[name][1]}" for name in idle]
        settings = _read_recipe(recipe, notes) if recipe else {}
        if explicit.keys() & _BATCH:  # ways to set the batch: the command line's wins
            settings = {key: value for key, value in settings.items() if key not in _BATCH}
        settings |= explicit
        for item in flags():
            if "in_file" in item.metadata and isinstance(file := settings.get(item.name), str):
                settings[item.name] = _read_yaml(flag_name(item.name), file, Path(file))
        return Config(**settings, given=frozenset(settings), notes=tuple(notes))
    except ValueError as error:
        parser.error(str(error))
