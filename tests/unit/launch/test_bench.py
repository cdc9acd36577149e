import copy
import json
import re
from importlib.util import find_spec

import pytest
import torch

from launch.bench.__main__ import main
from launch.bench.data import LIMITS, bench_data
from launch.bench.data import to_markdown as data_markdown
from launch.bench.optim import bench_optim, to_markdown, with_other_machines
from launch.bench.timing import transient_bytes
from launch.start import ROOT
from toolkit.files import read_json


def test_bench_prints_one_json_object(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.bench.optim._others", lambda: iter(()))  # they build for minutes
    assert main(["optim", "--model", "test_resnet", "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    (machine,) = result["machines"]
    rows = {row["name"]: row for row in machine["rows"]}
    assert rows["torch AdamW fused"]["state_bytes_per_prunable_weight"] >= 8
    assert 2.4 < rows["adamwprune 70%"]["state_bytes_per_prunable_weight"] < 2.55
    assert 1.2 < rows["sgdprune 70%"]["state_bytes_per_prunable_weight"] < 1.35
    assert rows["adamwprune 70%"]["other_state_bytes_per_prunable_weight"] > 0
    assert rows["adamwprune 70%"]["ratio_to_peer"] > 0
    assert rows["adamwprune 70%"]["met"] in (True, False)
    assert rows["adamwprune 70%"]["share_of_in_place_rate"] > 0
    assert machine["mask_update"]["selection_transient_bytes"] > 0
    text = (tmp_path / "optim-test_resnet.md").read_text()
    assert "No GPU was at hand" in text
    assert text.count(machine["device"]) == 2


def test_only_rows_with_a_bar_and_what_they_are_held_against():
    names = [row["name"] for row in bench_optim("test_resnet", 2, only_bars=True)["rows"]]
    assert names[:3] == ["torch AdamW fused", "torch SGD fused", "adamwprune 0%"]
    assert {"sgdprune 90%", "adamwprune int8 0%"} < set(names)
    assert not {"torch AdamW loop", "adamwprune bfloat16 0%", "adamwprune 70%, reference"} & set(names)


def test_machines_stand_side_by_side():
    kept = read_json(ROOT / "results" / "bench" / "optim.json")
    mine = copy.deepcopy(kept["machines"][0]) | {"device": "CPU: mine", "in_place_bytes_per_s": 3e10}
    for row in mine["rows"]:
        row |= {"share_of_in_place_rate": 0.8 if row["name"] == "sgdprune 70%" else 0.9}
    both = with_other_machines(mine, kept)
    text = to_markdown(both, "x")
    assert [machine["device"] for machine in both["machines"][:-1]] == [old["device"] for old in kept["machines"]]
    assert re.search(r"\| sgdprune 70% \| ≤ 1.00 \|.* \d\.\d\d, 80% \*\*missed\*\* \|\n", text)
    assert re.search(r"\| adamwprune 90% \| ≤ 0.65 \|.* \d\.\d\d, 90% \|\n", text)
    assert "30.0 GB/s in place" in text
    assert with_other_machines(mine, both) == both


def test_transient_bytes_counts_what_is_gone_again():
    def function():
        first = torch.ones(1000)
        second = first + 1
        del first
        return (second * 2).sum()

    assert 8000 <= transient_bytes(function) < 9000


@pytest.mark.long
def test_equivalence_of_the_implementations(capsys, tmp_path):
    assert main(["equivalence", "--model", "test_vit", "--steps", "40", "--json", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    for rows in result["optimizers"].values():
        for row in rows:
            assert row["furthest_weight"] <= result["weight_limit"]
            assert row["furthest_score"] <= result["score_limit"]
            if not row["own_masks"]:
                assert row["same_masks"]
                assert row["differing"] == 0


@pytest.mark.long
def test_data_bench_measures_every_bar():
    result = bench_data(3, num_images=24)
    assert result["bars"].keys() == LIMITS.keys()
    by_webdataset = () if find_spec("webdataset") else ("loader_ratio_to_timm", "loader_ratio_to_timm_normalised")
    assert [name for name, bar in result["bars"].items() if bar["value"] is None] == [*by_webdataset]
    of_this_process = ("first_batch_after_resume_s", "worker_mib")  # which other tests may have made large
    assert all(
        bar["value"] > 0 for name, bar in result["bars"].items() if name not in (*of_this_process, *by_webdataset)
    )
    assert 100 < result["image_kb"] < 115
    assert result["psnr_db"] >= 55  # does not depend on how busy the machine is, nor on this process's size
    page = data_markdown(result, "x")
    assert "first_batch_after_resume_s" in page
    assert page.count("not measured: webdataset is not installed") == len(by_webdataset)


def test_every_saving_shows_in_its_row():
    from launch.bench.memory import bench_memory
    from launch.bench.memory import to_markdown as memory_markdown

    result = bench_memory("test_resnet", 2, 64)
    for entry in result["savings"]:
        where = "peak" if entry["rows"] == ["activations"] else "between"
        before, after = (sum(entry[key][where].get(row, 0) for row in entry["rows"]) for key in ("before", "after"))
        assert after < before, entry["saving"]
    assert "| `--fused-backward` | gradients |" in memory_markdown(result, "make")
