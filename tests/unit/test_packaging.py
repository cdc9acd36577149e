"""What is installed: pyproject.toml against requirements.txt, the folders and the imports."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import toolkit
from toolkit.cli import parse
from toolkit.files import shipped_folder

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def test_requirements_are_pyprojects_with_the_same_bounds():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    extras = {name: set(wanted) for name, wanted in PROJECT["optional-dependencies"].items()}
    every = extras.pop("all")
    assert every == {f"{PROJECT['name']}[{','.join(extras)}]"}
    purposes = [set(PROJECT["dependencies"]), *extras.values()]
    assert sorted(line for line in lines if line) == sorted(one for purpose in purposes for one in purpose)


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "toolkit.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", toolkit.__version__)


def test_every_folder_of_the_toolkit_is_packaged_with_its_data():
    folders = {path.parent for path in (ROOT / "toolkit").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    mapped = SETUPTOOLS["package-dir"]
    assert sorted(SETUPTOOLS["packages"]) == sorted(names | mapped.keys())
    places = {name: ROOT / mapped.get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]}
    packaged = {
        file for name, globs in SETUPTOOLS["package-data"].items() for one in globs for file in places[name].glob(one)
    }
    data = {file for place in places.values() for file in place.iterdir() if file.suffix not in ("", ".py", ".pyc")}
    assert packaged == data


CORE = """
import sys

sys.modules.update(dict.fromkeys({blocked}))  # importing a module that stands here as None fails
import torch
from toolkit.optim import AdamWPrune, AdamWSPAM, SGDPrune, param_groups

torch.set_num_threads(1)
for kind in (AdamWPrune, SGDPrune, AdamWSPAM):
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.LayerNorm(30), torch.nn.Linear(30, 10))
    optimizer = kind(param_groups(model), lr=1e-3, sparsity=0.7, end_step=4, frequency=1)
    for _ in range(5):
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == 630
print('fine')
"""


def test_the_optimizers_need_the_core_alone():
    """`pip install .` brings no training stack; timm itself brings yaml, safetensors and the like."""
    extras = {
        re.split(r"[>=\[]", one)[0]
        for name in ("train", "study", "deepspeed", "export")
        for one in PROJECT["optional-dependencies"][name]
    }
    modules = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml", "torch-pruning": "torch_pruning"}
    timms = {"torchvision", "safetensors", "PIL", "yaml", "tqdm"}
    blocked = {modules.get(name, name) for name in extras} - timms
    assert {"accelerate", "webdataset", "tensorboard", "deepspeed", "sklearn", "simplejpeg"} <= blocked
    done = subprocess.run(
        [sys.executable, "-c", CORE.format(blocked=blocked)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "fine\n", done.stderr


def test_a_shipped_recipe_goes_by_its_name(tmp_path, monkeypatch, capsys):
    by_path = parse(["-c", str(ROOT / "launch" / "recipes" / "digits.yaml")])
    monkeypatch.chdir(tmp_path)
    assert parse(["-c", "digits.yaml"]) == by_path
    Path("digits.yaml").write_text("epochs: 3\n")  # the user's own goes before
    assert parse(["-c", "digits.yaml"]).epochs == 3
    with pytest.raises(SystemExit):
        parse(["-c", "digit.yaml"])
    shipped = "cifar10-small.yaml, digits-study.yaml, digits.yaml,"
    assert f"check the path, or take a shipped recipe: {shipped}" in capsys.readouterr().err
    for wrong in ("nowhere/digits.yaml", "../digits.yaml"):
        with pytest.raises(SystemExit):
            parse(["-c", wrong])


def test_the_launch_files_can_be_found(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--launch-files"])
    assert stop.value.code == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert folder == shipped_folder("accelerate_configs")
    assert (folder / "cpu.yaml").exists()


def test_without_the_training_stack_one_line_says_what_is_missing():
    code = "import sys; sys.modules['accelerate'] = None; from toolkit.train import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: accelerate is not installed; install this package with its [train]")
    assert done.stderr.count("\n") == 1
