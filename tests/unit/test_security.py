"""docs/security.md: each of its rows has a test, and its limits are those of the code."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
TABLES = [
    [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    for table in re.findall(r"(?m)(?:^\|.*\n)+", TEXT)
]


def known_tests():
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return found


def test_each_row_names_tests_that_exist():
    threats, known = TABLES[0], known_tests()
    assert len(threats) > 25
    for _, threat, _, tried in threats:
        names = re.findall(r"`(test_\w+)`", tried)
        assert names, threat
        assert set(names) <= known, threat


@pytest.mark.parametrize("row", [row for row in TABLES[1] if row[2]], ids=lambda row: row[0])
def test_a_limit_is_the_codes(row):
    module, _, constant = row[2].strip("`").rpartition(".")
    assert f"{getattr(importlib.import_module(module), constant):,}" == row[1].split()[0]


def test_what_is_not_defended_is_said():
    said = " ".join(cell for row in TABLES[2] for cell in row)
    for word in ("pipe:", "gloo", "store", "recipe", "redirect", "pickles"):
        assert word in said
