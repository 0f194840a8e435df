"""Which GPU, and the ceiling: how fast this GPU's memory can be read when it does nothing else."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from gpu.section import Section
from gpu.timing import interleaved

SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
READERS = ((1024, 4, 8), (2048, 4, 16), (4096, 8, 4), (4096, 8, 8), (8192, 8, 4))
"""(int32 numbers a step, warps, programs per multiprocessor) of the reading kernel; the fastest is the ceiling."""


@triton.jit(do_not_specialize=["count", "steps"])
def read_kernel(x_ptr, out_ptr, count, steps, BLOCK: tl.constexpr):
    """out[p] = sum of the int32 numbers of x [count] that program p reads, with wrap-around.

    Grid: (programs,). Programs take turns by blocks, so that together they walk through memory once.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for _ in tl.range(0, steps, num_stages=4):
        total += tl.load(x_ptr + offsets, mask=offsets < count, other=0)
        offsets += stride
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def run(section: Section) -> None:
    """One row ``gpu``; rows ``ceiling``: every way to read 1 GiB, and a copy (bytes read plus bytes written)."""
    found = {"gpu": "CPU", **_smi()}
    if not section.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda or torch.version.hip}
        found |= {"capability": f"{properties.major}.{properties.minor}"}
    section.emit("gpu", **found)
    size = 2**16 if section.dry else 2**30
    buffer = torch.randint(-9, 9, (size // 4,), dtype=torch.int32, device=section.device)
    target = torch.empty_like(buffer)
    calls = {"torch.sum": lambda: buffer.view(torch.float32).sum(), "copy": lambda: target.copy_(buffer)}
    calls |= {f"read {reader}": reading(section, buffer, reader) for reader in READERS[: 1 if section.dry else None]}
    for name, timing in interleaved(section, calls).items():
        section.emit("ceiling", way=name, **timing.row(2 * size if name == "copy" else size))


def reading(section: Section, x: torch.Tensor, reader: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    """A call that reads every byte of an int32 tensor.

    Raises:
        AssertionError: It does not read every number once.
    """
    block, warps, per_processor = reader
    processors = 1 if section.dry else torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.zeros(processors * per_processor, dtype=torch.int32, device=x.device)
    steps = -(-x.numel() // (len(out) * block))

    def read() -> torch.Tensor:
        read_kernel[(len(out),)](x, out, x.numel(), steps, BLOCK=block, num_warps=warps)
        return out

    if int(read().sum(dtype=torch.int64)) & 0xFFFFFFFF != int(x.sum(dtype=torch.int64)) & 0xFFFFFFFF:
        raise AssertionError("the reading kernel does not read every number once")
    return read


def fastest_reader(section: Section) -> tuple[int, int, int]:
    """The one of READERS that reads 1 GiB fastest."""
    x = torch.zeros(2**14 if section.dry else 2**28, dtype=torch.int32, device=section.device)
    readers = READERS[: 1 if section.dry else None]
    timings = interleaved(section, {str(reader): reading(section, x, reader) for reader in readers})
    return min(readers, key=lambda reader: timings[str(reader)].us)


def _smi() -> dict[str, str]:
    """What nvidia-smi reads of the first GPU; empty where there is no such program or it fails."""
    command = [
        shutil.which("nvidia-smi") or "",
        f"--query-gpu={','.join(SMI_FIELDS)}",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        values = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else {}
