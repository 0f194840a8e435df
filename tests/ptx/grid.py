"""Runs all programs of a grid, some at a time."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch

from ptx import floats, integers, moves, warps  # noqa: F401 they name their instructions
from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.parser import Program


def run(
    program: Program,
    grid: tuple[int, ...],
    arguments: list[Any],
    shared_bytes: int = 0,
    *,
    ctas: int = 64,
    backwards: bool = False,
    **machine: Any,
) -> collections.Counter[str]:
    """Runs a kernel.

    Args:
        program: The kernel.
        grid: Up to three sizes.
        arguments: Tensors on the CPU, which it changes, and numbers, in the order of its parameters. Parameters behind
            them are 0: pointers to scratch memory of Triton's own.
        shared_bytes: Shared memory of a program.
        ctas: Programs that run side by side.
        backwards: The last ones come first.
        machine: See :class:`ptx.machine.Machine`.

    Returns:
        How many warps have carried out each kind of instruction.
    """
    memory = GlobalMemory([x for x in arguments if isinstance(x, torch.Tensor)])
    params = [memory.address(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    params += [0] * (len(program.params) - len(params))
    sizes = (*grid, 1, 1)[:3]
    order = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes[::-1])[::-1], 1)
    order = order[::-1] if backwards else order
    executed: collections.Counter[str] = collections.Counter()
    for first in range(0, len(order), ctas):
        some = Machine(program, params, order[first : first + ctas], sizes, memory, shared_bytes, **machine)
        some.run()
        executed += some.executed
    return executed
