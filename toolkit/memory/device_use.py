"""How much of a whole GPU is in use, by anybody: several sources, the best one present is used and named.

Allocators know their own process only; the study's column is the whole device. Cards are matched by PCI address: their
numbers differ between torch, amdsmi and sysfs. None of the libraries is needed, and one that fails is named in the
report while the next one takes over.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from toolkit.markdown import MIB

SYSFS = Path("/sys/class/drm")
_ROCM_SMI = ("rocm-smi", "--showmeminfo", "vram", "--showbus", "--json")


Reading = TypeVar("Reading")


@dataclass
class Source(Generic[Reading]):
    """A source in use, and what reads it. `failed` says why better sources are not."""

    name: str
    read: Callable[[], Reading]
    failed: dict[str, str] = field(default_factory=dict)


def from_amdsmi(address: str) -> Callable[[], int]:
    """The amdsmi package; it counts in MiB. Raises LookupError where the card is not among its own."""
    import amdsmi

    amdsmi.amdsmi_init()
    for handle in amdsmi.amdsmi_get_processor_handles():
        if str(amdsmi.amdsmi_get_gpu_device_bdf(handle)).lower() == address:
            return lambda: int(amdsmi.amdsmi_get_gpu_vram_usage(handle)["vram_used"]) * MIB
    raise LookupError(f"no card at {address}")


def amdgpu_folder(address: str, folder: Path = SYSFS) -> Path:
    """Where sysfs has what amdgpu tells of a card. Raises LookupError where no card of its has this address."""
    for card in sorted(folder.glob("card[0-9]*")):
        device = card / "device"
        if device.resolve().name == address and (device / "mem_info_vram_used").is_file():
            return device
    raise LookupError(f"no amdgpu card at {address}")


def from_sysfs(address: str, folder: Path = SYSFS) -> Callable[[], int]:
    """amdgpu's counter in sysfs. Raises LookupError where no card has this address."""
    file = amdgpu_folder(address, folder) / "mem_info_vram_used"
    return lambda: int(file.read_text())


def from_rocm_smi(address: str, command: Sequence[str] = _ROCM_SMI) -> Callable[[], int]:
    """The study's own source, a process for each reading. Raises LookupError where the card is not listed."""

    def read() -> int:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        cards = json.loads(done.stdout)
        for facts in cards.values():
            if str(facts.get("PCI Bus", "")).lower() == address:
                return int(facts["VRAM Total Used Memory (B)"])
        raise LookupError(f"no card at {address}")

    read()
    return read


def from_nvml(address: str) -> Callable[[], int]:
    """NVIDIA's library through nvidia-ml-py."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def pci_address(device: torch.device) -> str:
    """A GPU's, as 0000:03:00.0."""
    facts: Any = torch.cuda.get_device_properties(device)
    return f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"


def find_device_use(device: torch.device) -> Source[int] | None:
    """The best source of the bytes in use that answers for this device, None without a GPU."""
    if device.type != "cuda":
        return None
    place = pci_address(device)
    return first_that_answers(
        {
            # torch's own query: NVML on CUDA, amdsmi on ROCm.
            "torch.cuda.device_memory_used": lambda: lambda: int(torch.cuda.device_memory_used(device)),
            "amdsmi": lambda: from_amdsmi(place),
            "sysfs": lambda: from_sysfs(place),
            "nvml": lambda: from_nvml(place),
            "rocm-smi": lambda: from_rocm_smi(place),
            "torch.cuda.mem_get_info": lambda: lambda: _used_by_driver(device),
        }
    )


def _used_by_driver(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def first_that_answers(sources: dict[str, Callable[[], Callable[[], Reading]]]) -> Source[Reading] | None:
    """The first source that can be opened and read; the reasons of those before it are kept."""
    failed: dict[str, str] = {}
    for name, opened in sources.items():
        try:
            read = opened()
            read()
        except Exception as error:  # libraries of drivers fail in ways of their own; the report names them all
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            return Source(name, read, failed)
    return None


def read_or_none(use: Source[Reading] | None) -> Reading | None:
    """A reading; None without a source, or where this one has failed (named in `failed` from then on)."""
    if use is None or use.name in use.failed:
        return None
    try:
        return use.read()
    except Exception as error:  # as above
        use.failed[use.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None
