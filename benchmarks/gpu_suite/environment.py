"""Section 0: which machine, which software, which source, and how fast its memory can be read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu_suite.context import Context
from gpu_suite.memory_read import measure_ceiling
from innerq_compile.kernels import triton as triton_kernels

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "flash-attn-3")
SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "ecc.mode.current",
    "temperature.gpu",
)  # fmt: skip


def run(context: Context) -> None:
    """One row ``machine``, rows ``ceiling``."""
    context.emit("machine", **machine(context.device))
    for row in measure_ceiling(context):
        context.emit("ceiling", **row)


def machine(device: torch.device) -> dict[str, Any]:
    """Names, versions and sizes."""
    found: dict[str, Any] = {"gpu": "CPU", "python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["kernels"], found["kernels_unavailable"] = list(triton_kernels.OPS), triton_kernels.unavailable()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": l2_bytes(device),
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "smi": smi(),
        }
    return found


def gpu_name() -> str:
    """The first GPU's, asked without making this process a user of the GPU where that can be done."""
    return smi().get("name") or torch.cuda.get_device_name(0)


def l2_bytes(device: torch.device) -> int:
    """Size of the GPU's last-level cache; where torch does not tell, more than any of today's has."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 128 * 2**20)


def smi() -> dict[str, str]:
    """What nvidia-smi reads of the first GPU; empty where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else {}


def source(commit: str | None) -> dict[str, str | None]:
    """Commit, as far as known, and a digest of the files that were run, which needs no git."""
    if commit is None and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return {"commit": commit, "digest": digest()}


def digest() -> str:
    """Of every source file of package, passes and kernels."""
    total = hashlib.sha256()
    for folder in ("innerq_compile", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
