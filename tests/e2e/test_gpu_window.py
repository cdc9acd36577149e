"""The plan of a GPU's window, in small and on a CPU: every kind of its parts runs to its end."""

import json

import pytest

from launch.gpu_check.__main__ import main
from launch.gpu_check.parts import PLANS
from launch.report.archive import read_runs


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_stand_in_runs_to_its_end(few_digits, tmp_path):
    paths = ["--data", str(few_digits), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    plan = ["--plan", str(PLANS / "stand-in.yaml")]
    assert main([*plan, *paths]) == 0, (tmp_path / "out" / "gpu_check.md").read_text()
    result = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert {part["outcome"] for part in result["parts"].values()} == {"ok"}
    assert " skipped" in result["parts"]["GPU tests"]["stdout"]
    assert result["parts"]["device times"]["result"]["kind"] == "cpu"
    study = f"{few_digits.name}-study"
    assert [row["study"] for row in result["runs"]] == [study, study, f"{few_digits.name}-variants"]
    for row in result["runs"]:  # a resumed run saw its last phases only; while masks change nothing is predicted
        assert all(phase["allocated_peak_bytes"] is None for phase in row["phases"].values())  # never an RSS
        predicted = [phase["predicted_total_bytes"] for name, phase in row["phases"].items() if name != "ramp"]
        assert predicted
        assert min(predicted) > 0
    resumed = {row["name"]: row["resumes"] for row in result["runs"]}
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    for log in (tmp_path / "work").glob("**/train.log"):  # killed before its first checkpoint, a run begins anew
        pairs = resumed[log.parent.name]
        assert len(pairs) == log.read_text().count("Resumed from")
        assert all(before["step"] < after["step"] for before, after in pairs)
    assert ("## Memory before and after a resume, MiB" in page) == any(resumed.values())
    assert len(read_runs(tmp_path / "out" / f"{study}.jsonl.xz")[0]) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gpu_check.json",
        "gpu_check.md",
        "study.md",
        f"{study}.jsonl.xz",
        f"{few_digits.name}-variants.jsonl.xz",
    }
