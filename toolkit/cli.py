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

from toolkit.config import Config, flag_name, flags
from toolkit.files import shipped_folder

_BATCH = {"batch_size", "global_batch_size", "auto_batch_size"}


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
        names = [flag_name(item), *([meta["short"]] if "short" in meta else [])]
        shown = f" (default {default})" if default not in (None, "", False) and default != {} else ""
        options: dict[str, Any] = {"dest": item.name, "help": meta["help"].replace("%", "%%") + shown}
        if isinstance(default, bool):
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
    return parser


def _read_recipe(path: str) -> dict[str, Any]:
    import yaml

    shipped = {file.name: file for file in sorted(shipped_folder("recipes").glob("*.yaml"))}
    file = Path(path)
    try:
        settings = yaml.safe_load((file if file.exists() else shipped.get(path, file)).read_text()) or {}
    except OSError as error:
        raise ValueError(
            f"-c {path} cannot be read ({error.strerror}); check the path, or take a shipped recipe: "
            f"{', '.join(shipped)}"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"-c {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"-c {path} must hold settings as key: value")
    known = {item.name: item for item in flags()}
    result = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{key!r} in {path} is not a setting.{_near(name, known)} Valid: {', '.join(known)}")
        result[name] = _checked(known[name], value, path)
    return result


def _checked(item: dataclasses.Field[Any], value: Any, path: str) -> Any:
    """A recipe's value in the type of its field; 1e-3 and 1 are good floats, True is a good bool only."""
    meta = item.metadata
    many = isinstance(meta.get("nargs"), int) or meta.get("nargs") == "+"
    if value is None and meta["default"] is None:
        return None
    try:
        if many:
            return [_scalar(meta["kind"], entry) for entry in value]
        return _scalar(meta["kind"], meta["const"] if value is True and "const" in meta else value)
    except (TypeError, ValueError):
        kind = f"{'a list of ' if many else ''}{meta['kind'].__name__}"
        # YAML takes 2:4 for a number to the base of 60, and so for 124.
        remedy = "; put it in quotes" if meta["kind"] is str and isinstance(value, (int, float)) else ""
        raise ValueError(f"{item.name}: {value!r} in {path} must be {kind}{remedy}") from None


def _scalar(kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
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
            valid = [flag_name(item) for item in flags()]
            name = unknown[0].partition("=")[0]
            raise ValueError(f"{unknown[0]} is not a flag of {prog}.{_near(name, valid)} Valid: {' '.join(valid)}")
        explicit = vars(known)
        recipe = explicit.pop("config", None)
        settings = _read_recipe(recipe) if recipe else {}
        if explicit.keys() & _BATCH:  # ways to set the batch: the command line's wins
            settings = {key: value for key, value in settings.items() if key not in _BATCH}
        settings |= explicit
        return Config(**settings, given=frozenset(settings))
    except ValueError as error:
        parser.error(str(error))
