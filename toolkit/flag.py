"""One flag: how a setting is declared, and the check of its value against that. Standard library only."""

import re
from dataclasses import Field, field
from functools import partial
from typing import Any

from toolkit.errors import refuse


def number_or_auto(text: Any) -> float | str:
    """A flag's value that is a number, or the word auto. Raises ValueError."""
    return "auto" if text == "auto" else float(text)


def whole_number(text: Any) -> int:
    """A flag's value that timm takes as a float, 3.0, and that counts things here. Raises ValueError."""
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def flag(default: Any, help_text: str, **options: Any) -> Any:
    """A field with its flag's help.

    Options: group (once, at its first flag), kind, nargs, const, choices, short; and what `check_value` holds a value
    against: within (an interval), counts (of values that nargs="+" may have), ordered; at_build: timm judges the text;
    in_file: the flag names a YAML file, and what stands in it is the value.
    """
    kind: Any = str if default is None else type(default)
    metadata = {"help": help_text, "default": default, "kind": kind, **options}
    if isinstance(default, (list, dict)):
        return field(default_factory=partial(kind, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_name(setting: str) -> str:
    """--weight-decay for the setting weight_decay."""
    return "--" + setting.replace("_", "-")


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LARGEST_INT = 2**31 - 1  # what torch, timm and timers take as a number of things


def check_value(item: Field[Any], value: Any) -> None:
    """Raise ValueError unless a flag's value, from wherever, is one of those that the flag declares."""
    meta, name = item.metadata, flag_name(item.name)
    choices, many = meta.get("choices"), isinstance(value, (list, tuple))
    known = ", ".join(str(choice) for choice in choices or () if choice not in ("", "default"))
    refuse(
        {
            f"{name} {one!r} is not known; choose one of {known}": choices and one not in choices
            for one in (value if many else [value])
        }
    )
    if isinstance(value, str) and not meta.get("at_build") and _UNPRINTABLE.search(value):
        raise ValueError(f"{name} {value!r} has a character that cannot be printed; use plain text on one line")
    if isinstance(value, dict) and "in_file" not in meta:
        refuse(
            {
                f"{name} {key!r} is no argument's name; give key=value": not (
                    isinstance(key, str) and key.isidentifier()
                )
                for key in value
            }
        )
    shown = f"{name} {' '.join(map(str, value)) if many else value}"
    counts = (meta["nargs"],) if many and isinstance(meta["nargs"], int) else meta.get("counts")
    if many and counts and len(value) not in counts:
        raise ValueError(f"{shown} must be {' or '.join(map(str, counts))} values")
    if "within" in meta and value != "auto":
        for number in value if many else [value]:
            _check_number(shown, number, meta["within"])
    if meta.get("ordered") and sorted(value) != list(value):
        raise ValueError(f"{shown} must be in ascending order")


def _check_number(shown: str, number: float, interval: str) -> None:
    """Raise ValueError unless a number lies in an interval such as [0, 1); NaN lies in none."""
    low, high = map(float, interval[1:-1].split(", "))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        least = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
        raise ValueError(f"{shown} must be {f'{least} and finite' if high == float('inf') else f'in {interval}'}")
    if isinstance(number, int) and high == float("inf") and number > _LARGEST_INT:
        raise ValueError(f"{shown} must be at most {_LARGEST_INT}")
