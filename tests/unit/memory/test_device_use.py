"""Sources of whole-device use on recorded answers: two cards, malformed and missing ones."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from toolkit.memory import device_use
from toolkit.memory.device_use import Source, find_device_use, first_that_answers, read_or_none
from toolkit.memory.sampler import MemorySampler

MIB = 2**20
FIRST, SECOND = "0000:03:00.0", "0000:83:00.0"


def sysfs_tree(folder, used):
    """/sys/class/drm with a card per address, numbered against the order of the addresses."""
    for number, (address, size) in enumerate(used.items()):
        real = folder / "devices" / address
        real.mkdir(parents=True)
        if size is not None:
            (real / "mem_info_vram_used").write_text(f"{size}\n")
        card = folder / "drm" / f"card{9 - number}"
        card.mkdir(parents=True)
        (card / "device").symlink_to(real)
    (folder / "drm" / "card9-DP-1").mkdir()
    return folder / "drm"


def test_sysfs_finds_the_card_by_its_address(tmp_path):
    folder = sysfs_tree(tmp_path, {FIRST: 12_884_901_888, SECOND: 38_273_024, "0000:00:02.0": None})
    assert device_use.from_sysfs(FIRST, folder)() == 12_884_901_888
    assert device_use.from_sysfs(SECOND, folder)() == 38_273_024
    for address in ("0000:00:02.0", "0000:04:00.0"):
        with pytest.raises(LookupError, match=f"no amdgpu card at {address}"):
            device_use.from_sysfs(address, folder)
    (tmp_path / "devices" / FIRST / "mem_info_vram_used").write_text("garbage")
    assert read_or_none(Source("sysfs", device_use.from_sysfs(FIRST, folder))) is None


def rocm_smi(tmp_path, answer, status=0):
    script = tmp_path / "smi.py"
    script.write_text(f"import sys; sys.stdout.write({answer!r}); sys.exit({status})")
    return (sys.executable, str(script))


TWO_CARDS = {
    "card0": {
        "PCI Bus": SECOND.upper(),
        "VRAM Total Memory (B)": "51522830336",
        "VRAM Total Used Memory (B)": "27889664",
    },
    "card1": {"PCI Bus": FIRST, "VRAM Total Memory (B)": "51522830336", "VRAM Total Used Memory (B)": "12866027520"},
}


def test_rocm_smi(tmp_path):
    command = rocm_smi(tmp_path, json.dumps(TWO_CARDS))
    assert device_use.from_rocm_smi(FIRST, command)() == 12_866_027_520
    assert device_use.from_rocm_smi(SECOND, command)() == 27_889_664
    with pytest.raises(LookupError):
        device_use.from_rocm_smi("0000:99:00.0", command)


@pytest.mark.parametrize(("answer", "status"), [("", 0), ("{not json", 0), ("{}", 0), ("{}", 1)])
def test_rocm_smi_malformed(tmp_path, answer, status):
    found = first_that_answers(
        {"rocm-smi": lambda: device_use.from_rocm_smi(FIRST, rocm_smi(tmp_path, answer, status))}
    )
    assert found is None


def test_amdsmi(monkeypatch):
    used = {"a": {"vram_total": 49_136, "vram_used": 12_270}, "b": {"vram_total": 49_136, "vram_used": 26}}
    bdf = {"a": SECOND, "b": FIRST}
    fake = SimpleNamespace(
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: ["a", "b"],
        amdsmi_get_gpu_device_bdf=bdf.get,
        amdsmi_get_gpu_vram_usage=used.get,
    )
    monkeypatch.setitem(sys.modules, "amdsmi", fake)
    assert device_use.from_amdsmi(SECOND)() == 12_270 * 2**20  # amdsmi counts in MiB
    assert device_use.from_amdsmi(FIRST)() == 26 * 2**20
    with pytest.raises(LookupError):
        device_use.from_amdsmi("0000:99:00.0")


def test_nvml(monkeypatch):
    answers = {FIRST.encode(): SimpleNamespace(total=150_754_820_096, free=1, used=8_123_456_789)}
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda address: answers[address],
        nvmlDeviceGetMemoryInfo=lambda handle: handle,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert device_use.from_nvml(FIRST)() == 8_123_456_789
    with pytest.raises(KeyError):
        device_use.from_nvml(SECOND)


def test_the_best_source_is_named_and_so_are_those_that_failed():
    def broken():
        raise OSError("libamd_smi.so: cannot open shared object file\nmore")

    found = first_that_answers({"amdsmi": broken, "sysfs": lambda: lambda: 5, "nvml": broken})
    assert (found.name, found.read()) == ("sysfs", 5)
    assert found.failed == {"amdsmi": "OSError: libamd_smi.so: cannot open shared object file"}
    assert first_that_answers({"amdsmi": broken}) is None


def test_no_gpu_no_source():
    assert find_device_use(torch.device("cpu")) is None
    assert read_or_none(None) is None


def test_sampler_samples_and_ends():
    readings = iter([10 * MIB, 30 * MIB + 7, 20 * MIB + MIB // 2])
    sampler = MemorySampler(Source("x", lambda: next(readings)), interval_s=0.01)
    for _ in range(200):
        if sampler.use.failed:
            break
        time.sleep(0.01)
    sampler.stop()
    assert sampler.use.failed["x"].startswith("StopIteration")  # the fourth reading failed and the run went on
    assert sampler.figures() == {
        "device_used_mean_bytes": (60 * MIB + 7 + MIB // 2) // 3,
        "device_used_peak_bytes": 30 * MIB + 7,
        "device_used_first_bytes": 10 * MIB,
        "device_used_study_mib": 20.0,
        "device_used_samples": 3,
        "device_load": {},
    }
    recent = sampler.recent()
    assert recent["device_used_bytes"] == 30 * MIB + 7
    assert recent["rss_bytes"] > 10 * MIB  # of this process
    assert sampler.recent() == {"device_used_bytes": None, "rss_bytes": None}


def test_sampler_without_a_device():
    sampler = MemorySampler(None)
    sampler.stop()
    figures = sampler.figures()
    assert (figures.pop("device_used_samples"), figures.pop("device_load")) == (0, {})
    assert set(figures.values()) == {None}
