"""What a device tells of its load: amdgpu's files and NVML's answers in their units, and the way into the report."""

import csv
import itertools
import json
import time

import pytest
import torch
from test_device_use import FIRST, SECOND, sysfs_tree

from toolkit.dist import World
from toolkit.memory import device_load, recorder
from toolkit.memory.device_load import find_device_load, from_sysfs, from_torch
from toolkit.memory.device_use import Source
from toolkit.memory.phases import Phase
from toolkit.memory.report import write_report
from toolkit.memory.sampler import MemorySampler


def amdgpu(tmp_path, files):
    """A tree with the first card's files, and a second card that has none."""
    folder = sysfs_tree(tmp_path, {FIRST: 1, SECOND: 1})
    for name, text in files.items():
        file = tmp_path / "devices" / FIRST / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_sysfs_in_the_kernels_units(tmp_path):
    files = {
        "gpu_busy_percent": "87\n",
        "hwmon/hwmon3/power1_average": "241000000\n",
        "hwmon/hwmon3/temp1_input": "71000\n",
        "hwmon/hwmon3/temp2_input": "83000\n",
    }
    folder = amdgpu(tmp_path, files)
    read = from_sysfs(FIRST, folder)
    assert read() == pytest.approx({"utilisation_percent": 87, "power_w": 241, "temperature_c": 71})
    (tmp_path / "devices" / FIRST / "gpu_busy_percent").write_text("3\n")
    assert read()["utilisation_percent"] == 3
    with pytest.raises(LookupError, match="tells nothing of the load"):
        from_sysfs(SECOND, folder)
    with pytest.raises(LookupError, match="no amdgpu card"):
        from_sysfs("0000:04:00.0", folder)


def test_sysfs_with_another_power_file_and_no_busy_one(tmp_path):
    folder = amdgpu(tmp_path, {"hwmon/hwmon0/power1_input": "35500000\n"})
    assert from_sysfs(FIRST, folder)() == pytest.approx({"power_w": 35.5})


def test_nvml_by_torch(monkeypatch):
    answers = {"utilization": 99, "power_draw": 412_345, "temperature": 64}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    assert from_torch(device)() == {"utilisation_percent": 99.0, "power_w": 412.345, "temperature_c": 64.0}
    monkeypatch.setattr(torch.version, "hip", "7.0")  # where power_draw gives watts, or 0 for "N/A"
    with pytest.raises(LookupError, match="watts"):
        from_torch(device)


def test_the_source_that_answers_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(device_load, "pci_address", lambda device: FIRST)
    monkeypatch.setattr(device_load, "from_torch", lambda device: lambda: {"power_w": 1.0})
    found = find_device_load(torch.device("cuda", 0))
    assert found.name == "nvml"
    assert found.failed["sysfs"].startswith("LookupError")
    assert find_device_load(torch.device("cpu")) is None


def test_a_source_that_fails_later_is_named_and_the_run_goes_on():
    loads = iter([{"power_w": 200.0}])
    sampler = MemorySampler(None, Source("nvml", lambda: next(loads)), interval_s=0.01)
    while not sampler.load.failed:
        time.sleep(0.01)
    sampler.stop()
    assert sampler.load.failed["nvml"].startswith("StopIteration")
    assert sampler.figures()["device_load"] == {"power_w": {"mean": 200.0, "highest": 200.0}}


def test_a_run_reports_it(monkeypatch, tmp_path):
    loads = itertools.chain([{"power_w": 200.0, "utilisation_percent": 50.0}], itertools.repeat({"power_w": 300.0}))
    monkeypatch.setattr(recorder, "find_device_load", lambda device: Source("sysfs", lambda: next(loads)))
    monkeypatch.setattr(recorder, "MemorySampler", lambda use, load: MemorySampler(use, load, interval_s=0.01))
    world = World.detect(torch.device("cpu"))
    log = recorder.MemoryLog(world)
    log.begin(dict, [Phase("dense", 1, 1, None)], tmp_path)
    while log.record()["device_load"].get("power_w", {}).get("highest") != 300.0:
        time.sleep(0.01)
    log.sample(1)
    log.close()
    write_report(log, world, tmp_path, {}, lambda rank: ({}, {}))
    report = json.loads((tmp_path / "memory.json").read_text())
    load = report["ranks"][0]["device_load"]
    assert 200 < load["power_w"]["mean"] < load["power_w"]["highest"] == 300
    assert load["utilisation_percent"] == {"mean": 50, "highest": 50}
    assert (report["sources"]["device_load"], report["sources"]["device_load_failed"]) == ("sysfs", {})
    with open(tmp_path / "memory_timeline.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert 200 < float(row["device_power_w"]) < 300
    assert (row["device_utilisation_percent"], row["device_temperature_c"]) == ("50.0", "")
    text = (tmp_path / "memory.md").read_text()
    assert "| rank | utilisation % | power W |" in text
    assert "| 0 | 50 (50) | " in text
