"""Launches that compile a Triton kernel for a GPU that is not there, and emulate its grid on CPU tensors."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ptx.grid import run
from ptx.parser import Program, parse


class PretendedDriver:
    """Tells Triton that a GPU of this compute capability is there; enough to compile, not to launch."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Kernels are cached by device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """There is none."""
        return 0


class Emulator:
    """Compiles for one compute capability, and runs ``ctas`` programs at a time, last ones first every other launch.

    Everything that hardware leaves open is taken as badly as it may be; see :class:`ptx.machine.Machine`. The
    compiler's ``options`` come in place of those of a launch.
    """

    def __init__(
        self, capability: int = 90, *, ctas: int = 64, options: dict[str, Any] | None = None, **machine: Any
    ) -> None:
        self.driver = PretendedDriver(capability)
        self.ctas, self.options = ctas, options or {}
        self.machine = {"late_copies": True, "truncating": True, "rough": True, **machine}
        self.executed: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._backwards = False

    def install(self) -> None:
        """From now on every launch of a Triton kernel in this process is emulated, and ends at PTX when compiled."""
        compile_only = JITFunction.run

        def launch(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
            compiled = compile_only(kernel, *args, grid=grid, warmup=True, **{**options, **self.options})
            if not warmup:
                values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
                dynamic = [values[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
                self.emulate(compiled.asm["ptx"], grid, dynamic, compiled.metadata.shared)
            return compiled

        triton.runtime.driver.set_active(self.driver)
        triton.knobs.runtime.add_stages_inspection_hook = _without_machine_code
        # Triton 3.6 does not tell kernels that were compiled with the hook from others.
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "without-machine-code")
        JITFunction.run = launch

    def emulate(self, text: str, grid: tuple[int, ...], arguments: list[Any], shared_bytes: int) -> None:
        """Runs a kernel's whole grid; see :func:`ptx.grid.run`."""
        order = {"ctas": self.ctas, "backwards": self._backwards}
        program = _parsed(text)
        self.executed[program.name] += run(program, grid, arguments, shared_bytes, **order, **self.machine)
        self._backwards = not self._backwards


def _without_machine_code(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook for its stages: leaves out the assembler, which takes most of the time."""
    if not arguments:
        return "without machine code", "without machine code"
    _, stages, *_ = arguments
    stages["cubin"] = lambda source, metadata: b""
    return None


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Program:
    return parse(text)
