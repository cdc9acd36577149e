import json

import torch

from launch.bench.__main__ import main
from launch.bench.data import LIMITS, bench_data
from launch.bench.data import to_markdown as data_markdown
from launch.bench.timing import transient_bytes


def test_bench_prints_one_json_object(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.bench.optim._others", lambda: iter(()))  # they build for minutes
    assert main(["optim", "--model", "test_resnet", "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["torch AdamW fused"]["state_bytes_per_prunable_weight"] >= 8
    assert 2.4 < rows["adamwprune 70%"]["state_bytes_per_prunable_weight"] < 2.55
    assert 1.2 < rows["sgdprune 70%"]["state_bytes_per_prunable_weight"] < 1.35
    assert rows["adamwprune 70%"]["other_state_bytes_per_prunable_weight"] > 0
    assert rows["adamwprune 70%"]["ratio_to_peer"] > 0
    assert rows["adamwprune 70%"]["met"] in (True, False)
    assert result["mask_update"]["selection_transient_bytes"] > 0
    assert "No GPU was at hand" in (tmp_path / "optim.md").read_text()


def test_transient_bytes_counts_what_is_gone_again():
    def function():
        first = torch.ones(1000)
        second = first + 1
        del first
        return (second * 2).sum()

    assert 8000 <= transient_bytes(function) < 9000


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


def test_data_bench_measures_every_bar():
    result = bench_data(3, num_images=24)
    assert result["bars"].keys() == LIMITS.keys()
    of_this_process = ("first_batch_after_resume_s", "worker_mib")  # which other tests may have made large
    assert all(bar["value"] > 0 for name, bar in result["bars"].items() if name not in of_this_process)
    assert 100 < result["image_kb"] < 115
    assert result["psnr_db"] >= 55  # does not depend on how busy the machine is, nor on this process's size
    assert "first_batch_after_resume_s" in data_markdown(result, "x")


def test_every_saving_shows_in_its_row():
    from launch.bench.memory import bench_memory, to_markdown

    result = bench_memory("test_resnet", 2, 64)
    for entry in result["savings"]:
        where = "peak" if entry["rows"] == ["activations"] else "between"
        before, after = (sum(entry[key][where].get(row, 0) for row in entry["rows"]) for key in ("before", "after"))
        assert after < before, entry["saving"]
    assert "| `--fused-backward` | gradients |" in to_markdown(result, "make")
