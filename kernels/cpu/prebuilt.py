"""Kernels that came compiled in the wheel, so that a user needs no compiler. What is not here is built on first use.

A wheel is made with ``INNERQ_BUILD_KERNELS=1`` (setup.py). It holds one library per instruction set path, for the torch
it was built with: the kernels register with torch's C++ dispatcher, whose ABI changes between minor versions, so a
library serves the torch of its own major and minor version only. With any other torch, or on a CPU that no library of
the wheel fits, the kernels are built on first use as ever.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Set
from pathlib import Path

import torch

from innerq_compile.kernels.cpu import build

FOLDER = build.SOURCE_DIR / "prebuilt"

NEEDS: dict[str, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}),
    "avxvnni": frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "avx_vnni"}),
    "avx2": frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}),
}
"""Instruction set path, the fastest first -> flags of /proc/cpuinfo without which its library must not be loaded."""


def load() -> ctypes.CDLL | None:
    """The fastest library of the wheel that this CPU and this torch can run, ``None`` where there is none."""
    for isa in runnable(cpu_flags()):
        path = FOLDER / file_name(isa)
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None  # another libc, or a torch with another ABI under the same number: build it here
    return None


def file_name(isa: str) -> str:
    """Name of a library for the torch that is installed."""
    return f"innerq_cpu_{isa}_torch{'.'.join(torch.__version__.split('.')[:2])}.so"


def runnable(flags: Set[str]) -> list[str]:
    """The paths that a CPU with these flags can run, the fastest first."""
    return [isa for isa, needed in NEEDS.items() if needed <= flags]


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in the words of Linux; nothing elsewhere."""
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].split()) if lines else frozenset()


def build_all(folder: Path, isas: tuple[str, ...] = tuple(NEEDS)) -> list[Path]:
    """Compiles a library per path into ``folder``, on any CPU.

    Raises:
        BuildError: No compiler, a failed build, or a machine of another kind.
    """
    if platform.machine() != "x86_64":
        raise build.BuildError(f"wheels with kernels are made for x86-64 Linux, not for {platform.machine()}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / file_name(isa) for isa in isas]
    for isa, path in zip(isas, paths, strict=True):
        build.compile_library(isa, path)
    return paths
