"""`0.5:0.9:0.1` in a matrix file or a menu: 0.5, 0.6, 0.7, 0.8, 0.9, in decimals as they are written."""

import argparse
import re
from decimal import Decimal
from typing import Any

import yaml

_NUMBER = r"-?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER}):({_NUMBER}):({_NUMBER})\s*")
_MOST = 10_000  # values: more is a slip


class Loader(yaml.SafeLoader):
    """YAML without its numbers of base 60: unquoted, 35:94:1 is a range as well, and 2:4 a pattern."""

    def construct_decimal(self, node: yaml.ScalarNode) -> str | int | float:
        """A number, or the text where a colon stands in it."""
        if ":" in node.value:
            return str(node.value)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.construct_decimal)


def expand(values: Any) -> list[Any]:
    """A list with its ranges `first:last:step` written out, `last` included where a step meets it; one value is a list.

    Raises ValueError for a range whose step does not lead from first to last, or takes above 10,000 steps.
    """
    every = values if isinstance(values, list) else [values]
    return [value for entry in every for value in (_numbers(entry) if isinstance(entry, str) else [entry])]


def seeds_of(text: str) -> list[int]:
    """A flag's seed, or those of a range. Raises argparse.ArgumentTypeError for anything else."""
    try:
        return [int(str(number)) for number in expand(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed or range; write 3, or 35:94:1") from None


def _numbers(text: str) -> list[Any]:
    """The numbers of a range, whole ones as int; other texts stay."""
    if not (found := _RANGE.fullmatch(text)):
        return [text]
    first, last, step = map(Decimal, found.groups())
    steps = (last - first) / step if step else Decimal(-1)
    if not 0 <= steps <= _MOST:
        raise ValueError(
            f"range {text}: its step does not lead from {first} to {last} in {_MOST} steps; write first:last:step"
        )
    kind = float if "." in text else int
    return [kind(first + number * step) for number in range(int(steps) + 1)]
