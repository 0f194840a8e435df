"""The ceiling: how fast this GPU reads memory when it does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_suite.context import Context
from gpu_suite.timing import Contender, interleave

READERS = ((1024, 4, 8), (2048, 4, 16), (4096, 8, 4), (4096, 8, 8), (8192, 8, 4))
"""(int32 numbers a step, warps, programs per multiprocessor) of the reading kernel; the fastest is the ceiling."""


def measure_ceiling(context: Context) -> list[dict[str, Any]]:
    """GB/s of plain reads, several ways, and of a copy (bytes read plus bytes written)."""
    size = 2**16 if context.dry else 2**30
    buffers = [torch.randint(-9, 9, (size // 4,), dtype=torch.int32, device=context.device) for _ in range(3)]
    target = torch.empty_like(buffers[0])
    contenders = {
        "torch.sum": Contender(lambda i: buffers[i % 3].view(torch.float32).sum(), 3, size),
        "copy": Contender(lambda i: target.copy_(buffers[i % 3]), 3, 2 * size),
    }
    if context.device.type == "cuda":
        for reader in READERS:
            read = make_reader(context.device, *reader)
            contenders[f"read {reader}"] = Contender(lambda i, read=read: read(buffers[i % 3]), 3, size)
        _check(make_reader(context.device, *READERS[0]), buffers[0])
    timings = interleave(contenders, context.device, rounds=7)
    return [{"way": name, "bytes": c.bytes, **timings[name].row(c.bytes)} for name, c in contenders.items()]


def best_reader(device: torch.device) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    """The fastest way to read one tensor (its size a multiple of 16 MiB or small) and its GB/s on 1 GiB."""
    buffers = [torch.randint(-9, 9, (2**28,), dtype=torch.int32, device=device) for _ in range(2)]
    readers = {str(reader): make_reader(device, *reader) for reader in READERS}
    contenders = {
        name: Contender(lambda i, read=read: read(buffers[i % 2]), 2, 2**30) for name, read in readers.items()
    }
    timings = interleave(contenders, device, rounds=5)
    name = min(timings, key=lambda name: timings[name].us)
    return readers[name], 2**30 / timings[name].us / 1e3


def make_reader(
    device: torch.device, block: int, num_warps: int, per_sm: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that reads every byte of an int32 tensor and returns partial sums."""
    import triton

    from gpu_suite.read_kernel import read_kernel

    programs = torch.cuda.get_device_properties(device).multi_processor_count * per_sm
    out = torch.zeros(programs, dtype=torch.int32, device=device)

    def read(x: torch.Tensor) -> torch.Tensor:
        steps = triton.cdiv(x.numel(), programs * block)
        read_kernel[(programs,)](x, out, x.numel(), steps, BLOCK=block, num_warps=num_warps)
        return out

    return read


def _check(read: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    if int(read(x).sum()) != int(x.sum()):
        raise AssertionError("the reading kernel does not read every number once")
