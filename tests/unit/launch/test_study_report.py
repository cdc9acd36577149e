"""Reports of made-up accuracies around real run folders (results/demo): tables and files."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from launch.report.__main__ import main
from launch.report.archive import read_runs
from launch.report.pictures_study import series
from launch.report.runs import group_by_method
from launch.report.verdict import picks

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results"


def test_methods_are_ranked_only_where_they_differ(report):
    text = (report / "report.md").read_text()
    minute = text[text.index("## In a minute") : text.index("## Ranking")]
    best = "adamwprune 70 % | 99.13 ± 0.15 | 2.53"
    taken = "**adamwprune 70 %** | 99.13 ± 0.15 (3) | 8.00 | 2.53"
    assert f"| **70 % sparsity** | {taken} | adamw: +0.03 ± 0.06 [-0.11, +0.18] | 1 / 1 / 0 |" in minute
    rival = "adamw + movement 70 % | 97.10 ± 0.10 | 12.12 | +2.03 ± 0.06 [+1.89, +2.18] | beyond noise"
    assert f"| {best} | {rival} | 1 / 1 / 0 |" in minute
    section = text[text.index("### 70 %") : text.index("Final epoch; mean")].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section if line.startswith("| ")]
    rows = {name: rest for name, *rest in cells}
    assert rows["adamw + movement 70 %"][3] == "3"
    assert rows["adamwprune 70 %"][3] == "1–2"
    assert rows["momentum + movement 70 %"][3] == "1–2"
    assert rows["adamw + movement 70 %"][4].startswith("+2.03 ± ")


@pytest.mark.parametrize("name", ["adamw", "resnet18_adamw_none_seed2"])
def test_rankings_against_a_baseline(runs, tmp_path, name):
    assert main([str(runs), "--out", str(tmp_path / "out.md"), "--baseline", name]) == 0
    text = (tmp_path / "out.md").read_text()
    assert text.count("| adamw − this |") == 2  # dense, and at 70 %
    assert re.search(r"\| adamw \+ movement 70 % \|.*\| \+2\.00 ± 0\.05 \[\+1\.88, \+2\.12\] \|", text)
    assert "--baseline adamw`" in text


def test_a_baseline_that_is_not_there_is_an_error(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(runs), "--out", str(tmp_path / "out.md"), "--baseline", "lion"])
    assert "--baseline lion is no method or run of these; there are " in capsys.readouterr().err
    assert not (tmp_path / "out.md").exists()


def test_the_cheapest_inside_the_spread_is_recommended(runs, tmp_path):
    for seed, top1 in {0: 98.9, 1: 99.6, 2: 99.2}.items():  # above adamwprune by 0.1 ± 0.2
        path = runs / f"resnet18_momentum_movement_70_seed{seed}" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"final_top1": top1}))
    assert main([str(runs), "--out", str(tmp_path / "study")]) == 0
    text = (tmp_path / "study" / "report.md").read_text()
    use = "**adamwprune 70 %** | 99.13 ± 0.15 (3) | 8.00 | 2.53 | +0.10 ± 0.20 [-0.40, +0.60]"
    assert f"| **70 % sparsity** | {use} | momentum + movement 70 %: 99.23 ± 0.35 |" in text


def test_what_takes_no_more_bytes_and_scores_higher_is_taken_instead(runs, tmp_path):
    """The cheapest row level with the best scatters widely; another within its bytes scores higher."""
    scores = {
        "adamw_movement": (99.2, 99.2, 99.2),
        "momentum_movement": (98.2, 99.4, 98.8),
        "adamwprune_state": (99.0,) * 3,
    }
    for name, values in scores.items():
        for seed, top1 in enumerate(values):
            path = runs / f"resnet18_{name}_70_seed{seed}" / "metrics.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"final_top1": top1}))
    (pick,) = [pick for pick in picks(group_by_method(read_runs(runs)[0])) if pick.sparsity]
    assert (pick.name, pick.best) == ("adamwprune 70 %", "adamw + movement 70 %")
    assert pick.below_best is not None
    assert pick.below_best.beyond_spread
    assert (pick.behind, pick.ahead) == (0, 1)


def copy_of(folder, name, **settings):
    """The run of seed 0 again, with other settings."""
    cell = shutil.copytree(folder / "resnet18_adamwprune_state_70_seed0", folder / name)
    (cell / "args.yaml").write_text(yaml.safe_dump(yaml.safe_load((cell / "args.yaml").read_text()) | settings))


def test_a_setting_is_named_where_it_is_not_the_usual_one(runs):
    for regrow in (0.1, 0.3):
        copy_of(runs, f"regrow={regrow}", prune_regrow=regrow, prune_end=0.4)
    copy_of(runs, "third", prune_end=0.4, prune_scope="layer")
    groups = group_by_method(read_runs(runs)[0])
    ours = {label: series(label, members) for label, members in groups.items() if label.startswith("adamwprune")}
    assert ours == {  # half have each prune_end but three of four regrow nothing
        "adamwprune 70 % prune_end=0.6": "adamwprune prune_end=0.6",
        "adamwprune 70 % prune_regrow=0.1": "adamwprune prune_regrow=0.1",
        "adamwprune 70 % prune_regrow=0.3": "adamwprune prune_regrow=0.3",
        "adamwprune 70 % prune_scope=layer": "adamwprune prune_scope=layer",
    }


def test_among_as_many_the_default_is_not_named(runs):
    copy_of(runs, "regrow", prune_regrow=0.1)
    copy_of(runs, "both", prune_regrow=0.1, lr=0.5)
    copy_of(runs, "rate", lr=0.5)
    labels = [label for label in group_by_method(read_runs(runs)[0]) if label.startswith("adamwprune 70 %")]
    (rate,) = {run.lr for run in read_runs(runs)[0] if run.optimizer == "adamwprune"} - {0.5}
    ends = [f"lr={rate:g}", "lr=0.5", f"lr={rate:g} prune_regrow=0.1", "lr=0.5 prune_regrow=0.1"]
    assert sorted(labels) == sorted(f"adamwprune 70 % {end}" for end in ends)


def test_a_setting_that_came_after_a_run_has_its_default(runs):
    """Seeds of a study that ran over several versions are one row, whether 90 was written as 90 or 90.0."""
    before = {label: len(members) for label, members in group_by_method(read_runs(runs)[0]).items()}
    path = runs / "resnet18_adamwprune_state_70_seed0" / "args.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["decay_epochs"] == 90
    del settings["prune_shrink"]
    path.write_text(yaml.safe_dump(settings | {"decay_epochs": 90.0, "prune_shrink": False}))
    assert {label: len(members) for label, members in group_by_method(read_runs(runs)[0]).items()} == before
    path.write_text(yaml.safe_dump(settings | {"prune_ends": True}))
    assert len(group_by_method(read_runs(runs)[0])) == len(before) + 1


def test_one_run_in_two_folders_is_an_error(runs, tmp_path, capsys):
    copy_of(runs, "again")
    with pytest.raises(SystemExit):
        main([str(runs), "--out", str(tmp_path / "out")])
    assert "are the same run (settings and seed); move one elsewhere" in capsys.readouterr().err


def test_files_for_others_programs(report):
    with open(report / "summary.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["adamw"]["top1_mean"]) == pytest.approx(99.1)
    assert float(rows["adamw"]["top1_stdev"]) == pytest.approx(0.1)
    assert rows["adamwprune 70 %"]["seeds"] == "0 1 2"
    results = json.loads((report / "all_results.json").read_text())
    assert len(results) == 12
    mine = next(one for one in results if one["test_id"] == "resnet18_adamwprune_state_70_seed1")
    assert mine["final_accuracy"] == 99.3
    assert mine["optimizer"] == "adamwprune"
    assert mine["gpu_memory_mean"] is None  # there was no GPU
    assert mine["success"] is True
    for name in ("args.yaml", "metrics.json", "memory.json", "summary.csv"):
        assert (report / "cells" / "resnet18_adamw_none_seed2" / name).exists()


def test_a_file_takes_the_tables_alone(runs, tmp_path):
    out = tmp_path / "rounds" / "tuning.md"
    assert main([str(runs), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["tuning.md"]
    text = out.read_text()
    assert text.startswith("# tuning: resnet18 on digits")
    assert "## Ranking" in text
    assert "![" not in text


def test_a_brief_report_keeps_its_runs_too(runs, tmp_path, capsys):
    assert main([str(runs), "--out", str(tmp_path / "brief"), "--brief"]) == 0
    assert capsys.readouterr().err.endswith("brief/report.md\n")
    names = {path.name for path in (tmp_path / "brief").iterdir() if path.suffix != ".png"}
    assert names == {"report.md", "summary.json", "runs.jsonl.xz"}
    again = read_runs(tmp_path / "brief" / "runs.jsonl.xz")[0]
    assert [run.metrics for run in again] == [run.metrics for run in read_runs(runs)[0]]
