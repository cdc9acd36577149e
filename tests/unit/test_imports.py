"""Imports go one way; see the design: leaves know nothing of optim, engine or Config, and nothing imports a command.

Imports within functions count like those at the top.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = {
    "toolkit.command",
    "toolkit.dist",
    "toolkit.errors",
    "toolkit.files",
    "toolkit.log",
    "toolkit.markdown",
    "toolkit.process",
    "toolkit.progress",
    "toolkit.timm_flags",
}
# What each room may import of ours, beside itself.
ALLOWED = {
    "toolkit.flag": {"toolkit.errors"},
    "toolkit.config": {"toolkit.config_rules", "toolkit.errors", "toolkit.files", "toolkit.flag"},
    "toolkit.config_rules": set(),
    "toolkit.cli": {"toolkit.config", "toolkit.files", "toolkit.flag", "toolkit.timm_flags"},
    **{leaf: set() for leaf in LEAVES},
    "toolkit.command": {"toolkit.log"},
    "toolkit.prune": LEAVES | {"toolkit.kernels"},
    "toolkit.kernels": LEAVES,
    "toolkit.data": LEAVES,
    "toolkit.memory": LEAVES | {"toolkit.prune"},
    "toolkit.optim": LEAVES | {"toolkit.prune", "toolkit.kernels"},
    "toolkit.engine": LEAVES | {"toolkit.prune", "toolkit.data", "toolkit.memory"},
    "toolkit.shrink": LEAVES | {"toolkit.prune"},
    "toolkit.semi_structured": LEAVES,
    "toolkit.builder": {"toolkit"},
    "shards": LEAVES | {"toolkit.data"},
    "launch": {"toolkit", "shards"},
    "toolkit.train": {"toolkit"},  # a command
    "train": {"toolkit.train"},
    "examples": {"toolkit.optim", "toolkit.engine"},  # what others are shown
}
# Who may import accelerate or deepspeed: the builder, the engines, a benchmark of DeepSpeed's own optimizer, users.
LAUNCHERS_ROOMS = ("toolkit.builder", "toolkit.engine.engines", "launch.bench.optim", "examples")


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


def imports(path):
    """Every module that a file names in an import, and what it takes from it, which may be a module too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module, f"{node.module}.{alias.name}") for alias in node.names)


def own_imports(path):
    return [
        name for name, _ in imports(path) if name.split(".")[0] in ("toolkit", "shards", "launch", "train", "tests")
    ]


def is_command(path):
    main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)
    return main or path.name == "__main__.py" or 'if __name__ == "__main__":' in path.read_text()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = room(module_name(path))
    if module_name(path) == "toolkit":
        assert not own_imports(path)
        return
    if is_command(path) and here.startswith("toolkit"):
        return
    assert here is not None, f"{path} is in no room; add it to ALLOWED with what it may import"
    for name in own_imports(path):
        target = room(name)
        if target == here:
            continue
        allowed = ALLOWED[here]
        fine = target in allowed or ("toolkit" in allowed and name.startswith("toolkit"))
        assert fine, f"{module_name(path)} imports {name}; {here} may import {sorted(allowed)}"


def test_nobody_imports_a_command():
    commands = {module_name(path) for path in files() if is_command(path)}
    assert {"train", "toolkit.memory.predict", "toolkit.optim.__main__"} <= commands
    found = {
        (module_name(path), name) for path in files() for pair in imports(path) for name in pair if name in commands
    }
    assert found == {("train", "toolkit.train")}  # the checkout's name of the same command


def test_only_builder_and_engines_know_the_launchers():
    found = {
        module_name(path)
        for path in files()
        for name, _ in imports(path)
        if name.split(".")[0] in ("accelerate", "deepspeed")
    }
    assert all(name.startswith(LAUNCHERS_ROOMS) for name in found), found
    assert {"toolkit.builder.accelerator", "toolkit.engine.engines.ddp"} <= found


def test_only_the_registry_knows_timms_private_module():
    users = [path for path in files() if "_optim_factory" in path.read_text()]
    assert [module_name(path) for path in users] == ["toolkit.optim.registry"]


def test_the_rule_would_notice():
    assert room("toolkit.prune.mask") == "toolkit.prune"
    assert "toolkit.optim" not in ALLOWED["toolkit.engine"]
    assert "toolkit.config" not in ALLOWED["toolkit.engine"]


def test_every_import_of_ours_is_there():
    """Lazy ones too, which no import of the module would notice."""
    modules = {module_name(path) for path in files()} | {"toolkit", "launch", "shards"}
    gone = {
        (module_name(path), name)
        for path in files()
        for name in own_imports(path)
        if name not in modules and not (ROOT / name.replace(".", "/")).is_dir()
    }
    assert not gone
