"""The wheel, outside the checkout: ten lines of a user's own, and the main job on two ranks by its packaged files."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import toolkit

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing in it but the wheel's content, built from what a build needs and no more."""
    # Asked without an import: looking for pip makes setuptools' hook give up distutils, and native code builds no more.
    if not list(importlib.metadata.distributions(name="pip")):
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("toolkit", "accelerate_configs", "launch/recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    done = subprocess.run([*command, "-w", str(folder)], cwd=source, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_what_is_in_it(site):
    (about,) = site.glob("*.dist-info")
    metadata = (about / "METADATA").read_text()
    assert f"\nVersion: {toolkit.__version__}\n" in metadata
    for extra in ("train", "study", "deepspeed", "all"):
        assert f"\nProvides-Extra: {extra}\n" in metadata
    assert "adamwprune-train = toolkit.train:main" in (about / "entry_points.txt").read_text()
    assert {path.name for path in site.iterdir()} == {"toolkit", about.name}  # neither launch, shards nor tests
    assert (site / "toolkit" / "memory" / "report_schema.json").exists()
    sources = {path.name for path in (site / "toolkit" / "kernels").iterdir() if path.suffix in (".cpp", ".h")}
    assert sources == {"bits.cpp", "narrow.cpp", "narrow_avx512.h", "packed.cpp", "packed.h"}


TEN_LINES = """
import math, sys; sys.path.insert(0, {site!r})
import timm, torch, toolkit
from toolkit.optim import AdamWPrune, param_groups
torch.set_num_threads(1)
model = timm.create_model("test_resnet", num_classes=10)
optimizer = AdamWPrune(param_groups(model), lr=1e-3, weight_decay=0.05, sparsity=0.7, end_step=10, frequency=3)
for step in range(12):
    torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.randint(10, (8,))).backward()
    optimizer.step(); optimizer.zero_grad()
weights = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
print(toolkit.__file__, sum(int((w == 0).sum()) for w in weights), math.floor(0.7 * sum(w.numel() for w in weights)))
"""


def test_ten_lines_outside_the_checkout(site, tmp_path):
    command = [sys.executable, "-I", "-c", TEN_LINES.format(site=str(site))]  # -I: no PYTHONPATH, no working folder
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "no native update" not in done.stderr  # the C++ sources are in the wheel
    file, zeros, wanted = done.stdout.split()
    assert file == str(site / "toolkit" / "__init__.py")
    assert zeros == wanted == "260097"


def test_the_main_job_by_its_packaged_files(site, few_digits, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    show = [sys.executable, "-m", "toolkit.train", "--launch-files"]
    done = subprocess.run(show, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{site / 'toolkit' / 'accelerate_configs'}\n"
    launch = [str(BIN / "accelerate"), "launch", "--config_file", f"{done.stdout.strip()}/cpu.yaml"]
    flags = "-c digits.yaml --model test_resnet --global-batch-size 16 --epochs 2 --opt adamwprune --sparsity 0.7"
    place = ["--data-dir", str(few_digits), "--output", str(tmp_path), "--experiment", "r"]
    command = [*launch, "-m", "toolkit.train", *flags.split(), *place]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["completed"] is True
    assert round(metrics["final_sparsity"], 4) == 0.7
