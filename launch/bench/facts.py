"""`python -m launch.bench facts`: the machine as found, to stand beside every figure measured on it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from datetime import date
from typing import Any

import torch

from launch.bench.timing import DEVICE, device_name
from launch.start import ROOT
from toolkit.builder.metadata import cpu_name
from toolkit.markdown import MIB, page, table

_SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
_PACKAGES = ("numpy", "timm", "torchvision", "accelerate", "triton", "pillow", "torchao")
_OPTIONAL = ("pytest", "hypothesis", "sklearn", "webdataset", "simplejpeg", "kconfiglib", "jsonschema", "deepspeed")


def _said_by(*command: str) -> str | None:
    """A program's output in one line; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    return " ".join(done.stdout.split()) if done.returncode == 0 else None


def _version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package.replace("pillow", "PIL")) else None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    smi = _said_by("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "--id=0")
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "multiprocessors": properties.multi_processor_count,
        "total_mib": properties.total_memory // MIB,
        "l2_mib": getattr(properties, "L2_cache_size", 0) // MIB,
        "devices": torch.cuda.device_count(),
        **(dict(zip(_SMI_FIELDS, smi.split(", "), strict=True)) if smi else {}),
    }


def bench_facts() -> dict[str, Any]:
    """Device, driver, clocks as they are now, versions, processor, commit; None for what nothing here tells."""
    return {
        "schema": "bench-facts/1",
        "date": date.today().isoformat(),
        "device": device_name(),
        "kind": DEVICE,
        **(_gpu() if DEVICE == "cuda" else {}),
        "processor": cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "not_installed": [name for name in _OPTIONAL if importlib.util.find_spec(name) is None],
        # A copy of the tree has no history; whoever made it says what it is of.
        "commit": os.environ.get("COMMIT") or _said_by("git", "rev-parse", "HEAD"),
    }


def to_markdown(result: dict[str, Any], command: str) -> str:
    """One line a fact."""
    rows = [
        [key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value]
        for key, value in result.items()
    ]
    return page(
        f"# The machine: {result['device']}",
        "",
        f"Made by `{command}`.",
        "",
        *table(["fact", "value"], rows, text=(0, 1)),
    )
