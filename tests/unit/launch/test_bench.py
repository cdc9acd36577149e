import json

from launch.bench import main


def test_bench_prints_one_json_object(capsys, tmp_path):
    assert main(["optim", "--model", "test_resnet", "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["torch AdamW fused"]["state_bytes_per_prunable_weight"] > 8
    assert rows["adamwprune 70%"]["state_bytes_per_prunable_weight"] < 2.6
    assert rows["sgdprune 70%"]["state_bytes_per_prunable_weight"] < 1.4
    assert rows["adamwprune 70%"]["ratio_to_peer"] > 0
    assert result["gpu"] is None
    assert "No GPU figures" in (tmp_path / "optim.md").read_text()
