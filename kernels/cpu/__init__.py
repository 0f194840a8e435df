"""CPU kernels in C++: append_kv, dequantize_kv and decode_attention at the speed of memory.

Importing this package builds nothing; the first op call on the CPU does, through :func:`unavailable` (see
:mod:`.build`). From then on the dispatcher calls C++ directly.
"""

from __future__ import annotations

import ctypes
import functools
import warnings

from innerq_compile import ops
from innerq_compile.kernels.cpu import build
from innerq_compile.kernels.cpu.settings import SLOWER, read_settings, unsupported

__all__ = ["attach", "description", "unavailable", "unsupported"]


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot be built on this machine, or ``None`` when they can (this builds and attaches them)."""
    try:
        attach(ops.NAMESPACE)
    except build.BuildError as error:
        warnings.warn(
            f"innerq: the CPU kernels are off, and the reference, which is right but {SLOWER}, runs instead: {error}. "
            "Install a C++ compiler such as g++, or name one: CXX=...",
            stacklevel=4,
        )
        return str(error)
    return None


def description() -> str:
    """Which kernels the CPU runs, in words: instruction set and threads, or the reason why there are none.

    Builds them if that was not tried yet.
    """
    reason = unavailable()
    if reason:
        return f"reference, because {reason}"
    name = build.load().innerq_instruction_set
    name.restype = ctypes.c_char_p
    threads = "torch's OpenMP threads"
    if not build.torch_omp_parallel():
        threads = "threads started by every call (no GOMP_parallel in torch's OpenMP)"
    return f"C++ for {name().decode()}, {threads}"


def attach(namespace: str, isa: str | None = None) -> None:
    """Registers the kernels of an instruction set path (see :mod:`.build`) for a namespace that has the three ops.

    Raises:
        BuildError: They cannot be built or do not fit the ops.
    """
    library = build.load(isa)
    reason = ctypes.create_string_buffer(1000)
    failed = library.innerq_register(
        namespace.encode(), read_settings, build.torch_omp_parallel(), reason, ctypes.c_size_t(len(reason))
    )
    if failed:
        raise build.BuildError(f"the kernels do not fit the ops: {reason.value.decode()}")
