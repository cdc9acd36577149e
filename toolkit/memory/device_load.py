"""What a whole GPU does, by anybody: its utilisation, power and temperature, as far as a source tells them."""

from collections.abc import Callable
from pathlib import Path

import torch

from toolkit.memory.device_use import SYSFS, Source, amdgpu_folder, first_that_answers, pci_address

LOAD = ("utilisation_percent", "power_w", "temperature_c")


def from_sysfs(address: str, folder: Path = SYSFS) -> Callable[[], dict[str, float]]:
    """amdgpu's files, with the kernel's units: percent, microwatts, thousandths of a degree.

    The temperature is the first sensor's, the edge. Raises LookupError where no card has this address.
    """
    device = amdgpu_folder(address, folder)
    places = {
        "utilisation_percent": (("gpu_busy_percent",), 1.0),
        "power_w": (("hwmon/hwmon*/power1_average", "hwmon/hwmon*/power1_input"), 1e-6),
        "temperature_c": (("hwmon/hwmon*/temp1_input",), 1e-3),
    }
    found = {
        kind: (file, unit)
        for kind, (patterns, unit) in places.items()
        for file in [file for pattern in patterns for file in sorted(device.glob(pattern))][:1]
    }
    if not found:
        raise LookupError(f"amdgpu tells nothing of the load of {address}")
    return lambda: {kind: int(file.read_text()) * unit for kind, (file, unit) in found.items()}


def from_torch(device: torch.device) -> Callable[[], dict[str, float]]:
    """NVML by torch's own queries, power in milliwatts. Raises LookupError on ROCm, where they have other units."""
    if torch.version.hip:
        raise LookupError("torch's queries of an AMD card give watts or 0 where milliwatts are promised")
    return lambda: {
        "utilisation_percent": float(torch.cuda.utilization(device)),
        "power_w": torch.cuda.power_draw(device) / 1000,
        "temperature_c": float(torch.cuda.temperature(device)),
    }


def find_device_load(device: torch.device) -> Source[dict[str, float]] | None:
    """The first source that answers for this device, None without one or without a GPU."""
    if device.type != "cuda":
        return None
    place = pci_address(device)
    return first_that_answers({"sysfs": lambda: from_sysfs(place), "nvml": lambda: from_torch(device)})
