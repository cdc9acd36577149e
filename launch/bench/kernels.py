"""`python -m launch.bench kernels`: the Triton kernels as compiled code, read. No GPU is needed, and nothing is timed.

Each kernel is compiled for an H100 (sm_90) and a Radeon PRO W7900 (gfx1100). Instructions are those of a thread, per
8 weights, on the way through; registers bound how many threads hide the waits for memory; a spill would be
memory traffic that nobody asked for.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from toolkit.kernels import triton_kernels, triton_packed
from toolkit.markdown import page, table

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
_FP32, _BF16, _INT8 = torch.float32, torch.bfloat16, torch.uint8
_ADAM, _SGD = {"AMSGRAD": False, "SPAM": False}, {"NESTEROV": True}
# name: (kernel, its constants, dtype of weights, of moments, dense, most instructions on sm_90)
KERNELS: dict[str, tuple[str, dict[str, bool], torch.dtype, torch.dtype, bool, int]] = {
    "adam": ("adam_kernel", _ADAM, _FP32, _FP32, False, 550),
    "adam, AMSGrad": ("adam_kernel", {**_ADAM, "AMSGRAD": True}, _FP32, _FP32, False, 600),
    "adam, bfloat16 moments": ("adam_kernel", _ADAM, _FP32, _BF16, False, 850),
    "adam, bfloat16 moments, dense": ("adam_kernel", _ADAM, _FP32, _BF16, True, 640),
    "adam, all bfloat16": ("adam_kernel", _ADAM, _BF16, _BF16, False, 930),
    "sgd": ("sgd_kernel", _SGD, _FP32, _FP32, False, 430),
    "sgd, bfloat16 moments": ("sgd_kernel", _SGD, _FP32, _BF16, False, 600),
    "adam, int8 moments": ("adam_kernel", _ADAM, _FP32, _INT8, False, 960),
    "adam, int8 moments, dense": ("adam_kernel", _ADAM, _FP32, _INT8, True, 750),
    "adam, AMSGrad, int8 moments": ("adam_kernel", {**_ADAM, "AMSGRAD": True}, _FP32, _INT8, False, 1190),
    "sgd, int8 moments": ("sgd_kernel", _SGD, _FP32, _INT8, False, 610),
    "sgd, int8 moments, dense": ("sgd_kernel", _SGD, _FP32, _INT8, True, 410),
    "spam": ("adam_kernel", {**_ADAM, "SPAM": True}, _FP32, _FP32, False, 600),
}
_POINTERS = {"rows": "*i64", "programs": "*i32", "counter": "*fp32", "lr_on_device": "*fp32"}


def _compile(kernel: str, own: Mapping[str, bool], constants: Mapping[str, Any], target: str) -> Any:
    """Triton's compiled code of a kernel; what torch hands over starts at multiples of 16 bytes."""
    function = getattr(triton_kernels, kernel)
    constants = {**constants, **own}
    options = {"num_warps": constants.pop("num_warps")}
    signature = {name: "constexpr" if name in constants else _POINTERS.get(name, "fp32") for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(function.arg_names) if name in _POINTERS
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def _nvidia(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)
    last = max(place for place, line in enumerate(code) if "EXIT" in line)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "instructions": last + 1,
        "registers": int(usage["REG"]),
        "spilled_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "barriers": sum("BAR.SYNC" in line for line in code),
    }


def _amd(text: str) -> dict[str, int]:
    facts = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    code = re.findall(r"^\s+(?:v|s|ds|global|buffer|flat)_\w+", text, re.MULTILINE)
    return {
        "instructions": len(code),
        "registers": facts["vgpr_count"],
        "spilled_bytes": 4 * (facts["vgpr_spill_count"] + facts["sgpr_spill_count"]),
        "barriers": sum("s_barrier" in line for line in code),
    }


def read(name: str, target: str) -> dict[str, int]:
    """What a compiled kernel is made of: instructions a thread per 8 weights, registers, spilled bytes, barriers."""
    kernel, own, weight, state, dense, _ = KERNELS[name]
    constants = triton_packed.flags(weight, state, dense=dense, stochastic_weights=True)
    built = _compile(kernel, own, constants, target)
    facts = _nvidia(built.asm["cubin"]) if target == "sm_90" else _amd(built.asm["amdgcn"])
    weights = triton_kernels.BLOCK.value // (32 * int(constants["num_warps"]))
    return {**facts, "instructions": facts["instructions"] * 8 // weights}


def bench_kernels() -> dict[str, Any]:
    """Every kernel for every target."""
    rows = [
        {
            "kernel": name,
            "target": target,
            **read(name, target),
            "limit": KERNELS[name][-1] if target == "sm_90" else None,
        }
        for name in KERNELS
        for target in TARGETS
    ]
    return {"triton": triton.__version__, "variant": triton_packed.VARIANT, "rows": rows}


def to_markdown(result: Mapping[str, Any], command: str) -> str:
    """The figures as a page."""
    keys = ("kernel", "target", "instructions", "limit", "registers", "spilled_bytes", "barriers")
    return page(
        "# The Triton kernels, compiled",
        "",
        "**Compiled code that was read, not a timing: no GPU ran.**",
        f"Triton {result['triton']}, variant {result['variant']}, by `{command}`.",
        "Instructions are a thread's per 8 weights.",
        "",
        *table(
            [key.replace("_", " ") for key in keys],
            [["–" if row[key] is None else row[key] for key in keys] for row in result["rows"]],
            (0, 1),
        ),
    )
