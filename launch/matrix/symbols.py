"""Reads launch/Kconfig, `.config` and defconfigs: of that language what our menu uses, without kconfiglib."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.start import ROOT

KCONFIG = ROOT / "launch" / "Kconfig"
_SILENT = ("mainmenu", "menu", "endmenu", "prompt", "help")  # words that are for the menu's reader alone
_SETTING = re.compile(r'CONFIG_(\w+)=(?:"((?:[^"\\]|\\.)*)"|([^"]*))|# CONFIG_(\w+) is not set')


@dataclass
class Symbol:
    """What the menu says of a symbol: bool, int or string, its default, its bounds, and what must be on for it."""

    kind: str = ""
    default: str = ""
    bounds: range | None = None
    needs: str = ""
    choice: int = 0  # number of the choice that it is one of; 0: of none

    def check(self, value: str, quoted: bool) -> str:
        """What is wrong with a value; nothing where nothing is."""
        if quoted != (self.kind == "string"):
            return "texts, and they alone, stand in quotes"
        if self.kind == "bool" and value not in ("y", "n"):
            return "it is y or n"
        if self.kind == "int" and not re.fullmatch(r"-?\d+", value):
            return "it is a whole number"
        if self.bounds is not None and int(value) not in self.bounds:
            return f"it is within {self.bounds[0]} and {self.bounds[-1]}"
        return ""


def read_menu(lines: Iterable[str]) -> dict[str, Symbol]:
    """The symbols of a Kconfig by name. Raises ValueError for a word that is not read here."""
    menu: dict[str, Symbol] = {}
    symbol, choices, choice, help_column = Symbol(), 0, 0, -1
    chosen = []  # the defaults of choices
    for line in (line.expandtabs().rstrip() for line in lines):
        column = len(line) - len(line.lstrip())
        if not line or -1 < help_column < column:
            continue
        word, _, rest = line.strip().partition(" ")
        help_column = column if word == "help" else -1
        if word == "config":
            symbol = menu[rest] = Symbol(choice=choice)
        elif word in ("choice", "endchoice"):
            choices += word == "choice"
            symbol, choice = Symbol(), choices if word == "choice" else 0
        elif word in ("bool", "int", "string"):
            symbol.kind, symbol.default = word, "n" if word == "bool" else ""
        elif word == "default" and symbol.kind:
            symbol.default = rest.strip('"')
        elif word == "default":
            chosen.append(rest)
        elif word == "range":
            low, high = map(int, rest.split())
            symbol.bounds = range(low, high + 1)
        elif word == "depends":
            symbol.needs = rest.removeprefix("on ")
        elif word not in _SILENT:
            raise ValueError(f"Kconfig: {line.strip()!r} is not read; extend launch/matrix/symbols.py")
    for name in chosen:
        menu[name].default = "y"
    return menu


def load(path: Path) -> dict[str, str]:
    """Symbol -> value of a .config or defconfig, defaults included.

    Raises ValueError for an unknown symbol, one set twice, and a value of another kind or out of range.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; make it with make menuconfig or make defconfig-<name>")
    menu, values = read_menu(KCONFIG.read_text().splitlines()), dict[str, str]()
    for line in map(str.strip, path.read_text().splitlines()):
        match = _SETTING.fullmatch(line)
        if match is None and (not line or line.startswith("#")):
            continue
        on, text, plain, off = match.groups() if match else (line, None, "", None)
        name, value = on or off, "n" if off else plain if text is None else re.sub(r"\\(.)", r"\1", text)
        if name not in menu:
            raise ValueError(f"{path}: {line!r} sets no symbol of launch/Kconfig; CONFIG_{{{','.join(menu)}}} do")
        wrong = "it is set twice" if name in values else menu[name].check(value, text is not None)
        if wrong:
            raise ValueError(f"{path}: CONFIG_{name}: {line!r}: {wrong}; mend that line")
        values[name] = value
    return _with_defaults(menu, values, path)


def _with_defaults(menu: dict[str, Symbol], values: dict[str, str], path: Path) -> dict[str, str]:
    """Every symbol's value: of a choice exactly one is on, and what needs a symbol that is off is off."""
    taken: dict[int, str] = {}
    for name, value in values.items():
        choice = menu[name].choice
        if choice and value == "y" and taken.setdefault(choice, name) != name:
            raise ValueError(f"{path}: CONFIG_{taken[choice]} and CONFIG_{name} exclude each other; keep one")
    found: dict[str, str] = {}
    for name, symbol in menu.items():
        found[name] = values.get(name, symbol.default)
        if symbol.choice in taken:
            found[name] = "y" if taken[symbol.choice] == name else "n"
        elif symbol.choice:
            found[name] = symbol.default
        if symbol.needs and found[symbol.needs] != "y":
            found[name] = "n"
    return found


def config_text(values: dict[str, str]) -> str:
    """A `.config` that says every symbol, to be edited or read again."""
    menu = read_menu(KCONFIG.read_text().splitlines())
    lines = []
    for name, value in values.items():
        if menu[name].kind == "string":
            escaped = re.sub(r'(["\\])', r"\\\1", value)
            lines.append(f'CONFIG_{name}="{escaped}"')
        else:
            lines.append(f"# CONFIG_{name} is not set" if value == "n" else f"CONFIG_{name}={value}")
    return "\n".join(lines) + "\n"
