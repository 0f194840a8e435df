"""CPU kernels in C++: append_kv, dequantize_kv and decode_attention at the speed of memory.

Importing this package or calling :func:`register` builds nothing; the first op call does (see :mod:`.build`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from innerq_compile import ops
from innerq_compile.kernels.cpu import build
from innerq_compile.kernels.cpu.launch import Kernels, unsupported

__all__ = ["register", "unavailable", "unsupported"]

OPS = ("append_kv", "dequantize_kv", "decode_attention")

_registered: list[torch.library.Library] = []


def register() -> None:
    """Attaches the kernels to the CPU key of the ``innerq`` ops; a second call does nothing."""
    if _registered:
        return
    library = torch.library.Library(ops.NAMESPACE, "IMPL", "CPU")
    for name in OPS:
        library.impl(name, _lazy(name))
    _registered.append(library)


def unavailable() -> str | None:
    """Why the kernels cannot be built on this machine, or ``None`` when they can (this builds them)."""
    return _kernels_or_reason()[1]


def _lazy(name: str) -> Callable[..., Any]:
    """The op's kernel; the build waits for the first call, and a failed one leaves the reference in place."""
    chosen: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not chosen:
            kernels = _kernels_or_reason()[0]
            chosen.append(getattr(kernels, name) if kernels else ops.DEFAULTS[name])
        return chosen[0](*args)

    return call


@functools.cache
def _kernels_or_reason() -> tuple[Kernels | None, str | None]:
    try:
        return Kernels(build.load()), None
    except build.BuildError as error:
        warnings.warn(f"innerq: the CPU kernels are off and the slow reference runs instead: {error}", stacklevel=4)
        return None, str(error)
