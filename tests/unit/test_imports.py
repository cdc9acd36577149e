"""Imports go one way; see the design: leaves know nothing of optim, engine or Config, and nothing imports train.py."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = {"toolkit.files", "toolkit.log", "toolkit.progress", "toolkit.dist", "toolkit.process"}
# What each room may import of ours, beside itself.
ALLOWED = {
    "toolkit.config": {"toolkit.files"},
    "toolkit.files": set(),
    "toolkit.log": set(),
    "toolkit.progress": set(),
    "toolkit.dist": set(),
    "toolkit.process": set(),
    "toolkit.prune": LEAVES | {"toolkit.kernels"},
    "toolkit.kernels": LEAVES,
    "toolkit.data": LEAVES,
    "toolkit.memory": LEAVES | {"toolkit.prune"},
    "toolkit.memory.predict": {"toolkit"},  # a command: it asks the registry and the models, and nothing imports it
    "toolkit.optim": LEAVES | {"toolkit.prune", "toolkit.kernels"},
    "toolkit.engine": LEAVES | {"toolkit.prune", "toolkit.data", "toolkit.memory"},
    "toolkit.builder": {"toolkit"},
    "shards": {"toolkit.data", "toolkit.progress"},
    "launch": {"toolkit", "shards"},
    "toolkit.train": {"toolkit"},  # a command
    "train": {"toolkit.train"},
    "examples": {"toolkit.optim", "toolkit.engine"},  # what others are shown
}


def files():
    found = [ROOT / "train.py"]
    for folder in ("toolkit", "shards", "launch", "examples"):
        found += sorted((ROOT / folder).rglob("*.py"))
    return found


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return max((name for name in ALLOWED if module == name or module.startswith(name + ".")), key=len, default=None)


def own_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("toolkit", "shards", "launch", "train", "tests"):
                yield name


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = room(module_name(path))
    if module_name(path) == "toolkit":
        assert not list(own_imports(path))
        return
    assert here is not None, f"{path} is in no room; add it to ALLOWED with what it may import"
    for name in own_imports(path):
        target = room(name)
        if target == here:
            continue
        allowed = ALLOWED[here]
        fine = target in allowed or ("toolkit" in allowed and name.startswith("toolkit"))
        assert fine, f"{module_name(path)} imports {name}; {here} may import {sorted(allowed)}"


def test_only_the_registry_knows_timms_private_module():
    users = [path for path in files() if "_optim_factory" in path.read_text()]
    assert [module_name(path) for path in users] == ["toolkit.optim.registry"]


def test_the_rule_would_notice():
    assert room("toolkit.prune.mask") == "toolkit.prune"
    assert "toolkit.optim" not in ALLOWED["toolkit.engine"]
    assert "toolkit.config" not in ALLOWED["toolkit.engine"]
