"""`make menuconfig` and the defconfigs: a test matrix chosen in a menu (launch/Kconfig), kept in `.config`.

The menu itself and savedefconfig need kconfiglib; all else reads and writes `.config` without it.
"""

import os
import sys
from pathlib import Path
from typing import Any

from launch.matrix.menu import DEFCONFIGS, defconfig_names
from launch.matrix.symbols import KCONFIG, config_text, load
from toolkit.command import command_parser, one_line_errors, say
from toolkit.files import write_atomically


def _open_menu(path: Path | None = None) -> Any:
    """kconfiglib's menu with its defaults, or with the choices of a .config."""
    try:
        import kconfiglib
    except ImportError:
        raise ValueError(
            "kconfiglib is not installed; pip install kconfiglib, or take a ready choice, make defconfig-<name>, and "
            "edit .config"
        ) from None
    menu = kconfiglib.Kconfig(str(KCONFIG), warn_to_stderr=False)
    if path is not None:
        menu.load_config(str(path))
    return menu


def _menuconfig(config: Path) -> int:
    if not sys.stdin.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        say(
            "make menuconfig needs a terminal. Without one take a ready choice, make defconfig-<name> "
            f"({', '.join(defconfig_names())}), and edit .config, whose symbols launch/Kconfig explains."
        )
        return 2
    menu = _open_menu()
    import menuconfig

    os.environ["KCONFIG_CONFIG"] = str(config)
    menuconfig.menuconfig(menu)
    return 0


def _take_defconfig(name: str, config: Path) -> None:
    if name not in defconfig_names():
        raise ValueError(f"no defconfig {name}; there are {', '.join(defconfig_names())}")
    write_atomically(config, config_text(load(DEFCONFIGS / name)))
    say(f"{config} is {name} now; make test-matrix starts it")


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and do one of menuconfig, defconfig, list-defconfigs, savedefconfig, name."""
    parser = command_parser(
        "launch.matrix.kconfig",
        __doc__,
        {
            "what": {"choices": ("menuconfig", "defconfig", "list-defconfigs", "savedefconfig", "name")},
            "defconfig": {"nargs": "?", "help": "name of a file in launch/defconfigs"},
            "--config": {"type": Path, "default": Path(".config"), "help": "default %(default)s"},
        },
    )
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        if options.what == "menuconfig":
            return _menuconfig(options.config)
        if options.what == "list-defconfigs":
            for name in defconfig_names():
                title = (DEFCONFIGS / name).read_text().splitlines()[0].removeprefix("# ")
                print(f"{name:<28} {title}")  # noqa: T201
        elif options.what == "defconfig":
            _take_defconfig(str(options.defconfig), options.config)
        elif options.what == "savedefconfig":
            load(options.config)
            _open_menu(options.config).write_min_config("defconfig")
            say("written to ./defconfig; move it to launch/defconfigs/<name> to keep it")
        else:
            print(load(options.config)["MATRIX_NAME"])  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
