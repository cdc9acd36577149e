"""A measured result as two files: JSON for programs, Markdown for people."""

from pathlib import Path
from typing import Any

from toolkit.files import write_atomically, write_json


def write_result(folder: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write `<name>.json` and `<name>.md`; the folder is made."""
    write_json(folder / f"{name}.json", result, indent=1)
    write_atomically(folder / f"{name}.md", text)
