import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.matrix import run as matrix_module
from launch.matrix.__main__ import main
from launch.matrix.cells import Matrix, load_matrix
from launch.matrix.ranges import expand
from launch.report.archive import read_runs
from toolkit.builder.resume import check_same_settings
from toolkit.cli import parse
from toolkit.engine.history import is_complete

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "launch" / "defconfigs" / "demo"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def write(path, **changes):
    content = {
        "name": "m",
        "accelerate_config": "accelerate_configs/cpu.yaml",
        "recipe": "launch/recipes/digits.yaml",
        "seeds": [0],
        "cells": [{"opt": "adamw"}],
    }
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def test_demo_cells_and_names():
    names = [cell.name for cell in load_matrix(DEMO, seeds=[0, 1]).cells]
    assert names[:6] == [
        "resnet18_momentum_none_seed0",
        "resnet18_momentum_movement_70_seed0",
        "resnet18_adamw_none_seed0",
        "resnet18_adamw_movement_70_seed0",
        "resnet18_adamwprune_state_70_seed0",
        "resnet18_adamwprune_state_70_state-dtype=float32_seed0",
    ]
    assert names[6] == "resnet18_momentum_none_seed1"


def test_a_cells_name_does_not_depend_on_its_neighbours(tmp_path):
    cells = [{"opt": "adamw"}, {"opt": "adamw", "lr": 0.002}, {"opt": "adamwprune", "sparsity": 0.7}]
    alone = {load_matrix(write(tmp_path / "m.yaml", cells=[cell])).cells[0].name for cell in cells}
    assert alone == {cell.name for cell in load_matrix(write(tmp_path / "m.yaml", cells=cells)).cells}
    assert "resnet18_adamw_none_lr=0.002_seed0" in alone


def test_dry_run_prints_commands_that_parse(capsys):
    assert main([str(DEMO), "--dry-run", "--model", "resnet50", "--only", "*adamwprune_state_70_seed0"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    head, _, flags = line.partition(" train.py ")
    assert head == "accelerate launch --config_file accelerate_configs/cpu.yaml"
    config = parse(flags.split())
    assert (config.model, config.opt, config.sparsity) == ("resnet50", "adamwprune", 0.7)
    assert config.experiment == "resnet50_adamwprune_state_70_seed0"


def test_every_shipped_matrix_and_recipe_is_read():
    for folder in ("matrices", "defconfigs"):
        for path in (ROOT / "launch" / folder).iterdir():
            assert load_matrix(path).cells
    for path in (ROOT / "launch" / "recipes").glob("*.yaml"):
        parse(["-c", str(path)])


def test_mistakes(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"unknown keys \['sed'\]"):
        load_matrix(write(tmp_path / "m.yaml", sed=[1]))
    with pytest.raises(ValueError, match="cannot be read"):
        load_matrix(tmp_path / "none.yaml")
    with pytest.raises(SystemExit):
        load_matrix(write(tmp_path / "m.yaml", cells=[{"optt": "adamw"}]))
    assert "Did you mean --opt" in capsys.readouterr().err
    with pytest.raises(ValueError, match="two cells are the same"):
        load_matrix(write(tmp_path / "m.yaml", cells=[{"opt": "adamw"}, {"opt": "adamw", "pruning": "none"}]))
    with pytest.raises(SystemExit):
        main([str(DEMO), "--only", "nothing"])
    error = capsys.readouterr().err
    assert "--only nothing matches none of 6 cells" in error
    assert len(error) < 400  # a study's 85 names were a screenful


def test_a_folder_made_with_other_settings_is_not_taken_for_the_cell(tmp_path):
    (cell,) = load_matrix(write(tmp_path / "m.yaml")).cells
    check_same_settings(tmp_path, cell.config)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({**cell.config.to_dict(), "epochs": 3, "output": "elsewhere"}))
    with pytest.raises(ValueError, match="made with epochs=3, now 15"):
        check_same_settings(tmp_path, cell.config)


FAKE = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[1])
if "adamw_" in folder.name and not (folder / "tried").exists():
    (folder / "tried").touch()
    print("the reason")
    sys.exit(3)
(folder / "metrics.json").write_text(json.dumps({"completed": True}))
"""


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_failed_cell_is_recorded_and_the_matrix_goes_on(tmp_path, monkeypatch, capsys, jobs):
    path = write(tmp_path / "m.yaml", cells=[{"product": {"opt": ["adamw", "adam"]}}])
    monkeypatch.setattr(Matrix, "command", lambda self, cell, runs: ["python", "-c", FAKE, str(runs / cell.name)])
    monkeypatch.setattr(matrix_module, "_POLL_S", 0.05)
    command = [str(path), "--out", str(tmp_path / "runs"), "--jobs", jobs]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "FAILED resnet18_adamw_none_seed0 (exit status 3)" in message
    assert "\n  the reason\n" in message
    assert "1 of 2 cells failed" in message
    assert is_complete(tmp_path / "runs" / "resnet18_adam_none_seed0")
    record = json.loads((tmp_path / "runs" / "failed.json").read_text())
    assert record["resnet18_adamw_none_seed0"]["status"] == 3
    assert Path(record["resnet18_adamw_none_seed0"]["log"]).exists()
    assert main([*command, "--failed"]) == 0
    assert json.loads((tmp_path / "runs" / "failed.json").read_text()) == {}
    assert main([*command, "--failed"]) == 0
    assert "no failed cell" in capsys.readouterr().err


def test_a_folder_of_two_matrices_names_the_last_command_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(Matrix, "command", lambda self, cell, runs: ["python", "-c", FAKE, str(runs / cell.name)])
    monkeypatch.setattr(matrix_module, "_POLL_S", 0.05)
    first, second = (write(tmp_path / f"an {name}.yaml", cells=[{"opt": name}]) for name in ("adam", "sgd"))
    place = ["--out", str(tmp_path / "runs")]
    for path, jobs in ((first, "1"), (second, "1"), (second, "2")):
        assert main([str(path), *place, "--jobs", jobs]) == 0
    commands = [
        f"python -m launch.matrix '{path}' {' '.join(place)} --jobs {n}" for path, n in ((first, 1), (second, 2))
    ]
    assert (tmp_path / "runs" / "command.txt").read_text() == " && ".join(commands) + "\n"


def test_products_settings_by_optimizer_and_names(tmp_path):
    cells = [
        {"opt": "adamw"},
        {"product": {"opt": ["adamw", "sgdprune"], "pruning": ["state"], "sparsity": [0.7, 0.9]}, "epochs": 2},
        {"product": {"lr": [0.1, 0.2]}, "opt": "momentum"},
    ]
    path = write(tmp_path / "m.yaml", cells=cells, per_opt={"sgdprune": {"lr": 0.5}}, accelerate_config=None)
    matrix = load_matrix(path)
    assert [cell.name for cell in matrix.cells] == [
        "resnet18_adamw_none_seed0",
        "resnet18_adamw_state_70_epochs=2_seed0",
        "resnet18_adamw_state_90_epochs=2_seed0",
        "resnet18_sgdprune_state_70_epochs=2_seed0",
        "resnet18_sgdprune_state_90_epochs=2_seed0",
        "resnet18_momentum_none_lr=0.1_seed0",
        "resnet18_momentum_none_lr=0.2_seed0",
    ]
    assert [cell.config.lr for cell in matrix.cells] == [2e-3, 2e-3, 2e-3, 0.5, 0.5, 0.1, 0.2]
    assert [cell.config.epochs for cell in matrix.cells] == [15, 2, 2, 2, 2, 15, 15]
    assert matrix.command(matrix.cells[0], tmp_path)[:2] == ["python", "train.py"]
    more = load_matrix(write(tmp_path / "m.yaml", cells=[{"opt": "adam"}, {"opt": "adamw", "seeds": [0, 4]}]))
    assert [cell.name[9:] for cell in more.cells] == ["adam_none_seed0", "adamw_none_seed0", "adamw_none_seed4"]
    shared = load_matrix(
        write(tmp_path / "m.yaml", settings={"epochs": 4, "lr": 0.3}, per_opt={"adamw": {"lr": 0.4}}, jobs=3)
    )
    assert (shared.cells[0].name, shared.jobs) == ("resnet18_adamw_none_seed0", 3)
    assert (shared.cells[0].config.epochs, shared.cells[0].config.lr) == (4, 0.4)
    ranks = load_matrix(write(tmp_path / "m.yaml", ranks=1))
    with pytest.raises(ValueError, match="ranks=2 needs an accelerate_config"):
        load_matrix(write(tmp_path / "m.yaml", ranks=2, accelerate_config=None))
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        load_matrix(write(tmp_path / "m.yaml", jobs=0))
    assert ranks.launcher[-2:] == ("--num_processes", "1")
    with pytest.raises(ValueError, match="per_opt names adam, which no cell"):
        load_matrix(write(tmp_path / "m.yaml", per_opt={"adam": {}}))


@settings(deadline=None)
@given(st.integers(-50, 50), st.integers(1, 40), st.integers(0, 60), st.sampled_from([1, 10, 100]))
def test_ranges_are_their_decimals(first, step, steps, scale):
    numbers = [(first + number * step) / scale for number in range(steps + 1)]  # rounded once, as a literal is
    written = ":".join(repr(number / scale) for number in (first, first + steps * step, step))
    assert expand(["a", written, 2]) == ["a", *numbers, 2]
    assert expand(f"{first}:{first + steps * step + step - 1}:{step}") == [first + i * step for i in range(steps + 1)]


@pytest.mark.parametrize("text", ["1:2:0", "1:2:-1", "0.9:0.5:0.1", "0:1:0.00001"])
def test_a_range_that_leads_nowhere_is_an_error(text):
    with pytest.raises(ValueError, match=f"range {text}: "):
        expand([text])


def test_seeds_of_the_command_line_may_be_ranges(tmp_path, capsys):
    flags = ["--only", "*_adamw_none*", "--out", str(tmp_path), "--dry-run"]
    assert main([str(ROOT / "launch/matrices/digits.yaml"), "--seeds", "7", "3:5:1", *flags]) == 0
    found = re.findall(r"--seed (\d+)", capsys.readouterr().out)
    assert found == ["7", "3", "4", "5"]
    for text in ("3x", "5:1:1", "1:2:0.5"):
        with pytest.raises(SystemExit) as stop:
            main([str(ROOT / "launch/matrices/digits.yaml"), "--seeds", text, *flags])
        assert stop.value.code == 2
        assert f"{text!r} is no seed or range" in capsys.readouterr().err


def test_what_is_no_range_stays():
    values = ["2:4", "a:b:c", "1:2:3:4", "", "1.:2:1", True, None, {"a": "1:2:1"}]
    assert expand(values) == values
    assert expand(0.5) == [0.5]


def test_ranges_in_a_file(tmp_path):
    cells = [{"product": {"opt": ["adamwprune"], "sparsity": [0, "0.5:0.7:0.1"]}, "seeds": "3:5:2"}]
    names = [cell.name for cell in load_matrix(write(tmp_path / "m.yaml", cells=cells)).cells]
    assert [name[9:] for name in names if name.endswith("seed3")] == [
        f"adamwprune_state{share}_seed3" for share in ("", "_50", "_60", "_70")
    ]
    assert len(names) == 8


def test_a_range_needs_no_quotes_though_yaml_has_numbers_of_base_60(tmp_path):
    """Of `3:5:2` YAML makes 11,102, of `2:4` 124."""
    path = write(tmp_path / "m.yaml")
    text = (
        path.read_text()
        .replace("seeds:\n- 0", "seeds: 3:5:2")
        .replace("- opt: adamw", "- product: {opt: [sgdprune], %s}")
    )
    path.write_text(text % "sparsity: [0.5:0.7:0.1, 1.0e-1]")
    found = [(cell.config.seed, cell.config.sparsity) for cell in load_matrix(path).cells]
    assert sorted(found) == [(seed, share) for seed in (3, 5) for share in (0.1, 0.5, 0.6, 0.7)]
    path.write_text(text % "prune_pattern: [2:4]")
    assert [cell.config.prune_pattern for cell in load_matrix(path).cells] == ["2:4", "2:4"]


def test_unfinished_runs_are_not_reported(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.yaml").write_text("{}")
    assert not is_complete(tmp_path / "a")
    (tmp_path / "a" / "metrics.json").write_text('{"completed": false}')
    assert not is_complete(tmp_path / "a")
    with pytest.raises(ValueError, match="holds no complete run"):
        read_runs(tmp_path)
