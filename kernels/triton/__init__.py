"""Triton kernels for CUDA and ROCm (torch calls both devices ``cuda``): append_kv, dequantize_kv, decode_attention.

Importing this package or calling :func:`register` imports no Triton; the first op call on such a device does.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from innerq_compile import ops

__all__ = ["register", "unavailable"]

OPS: tuple[str, ...] = ("decode_attention",)
"""Ops that have a kernel here: launcher ``op`` in module ``.op``, with the arguments of the op."""

_registered: list[torch.library.Library] = []


def register() -> None:
    """Attaches the kernels to the CUDA key of the ``innerq`` ops; a second call does nothing."""
    if _registered:
        return
    library = torch.library.Library(ops.NAMESPACE, "IMPL", "CUDA")
    for name in OPS:
        library.impl(name, _lazy(name))
    _registered.append(library)


@functools.cache
def unavailable() -> str | None:
    """Why Triton cannot be used here, or ``None`` when it can."""
    try:
        import_module("triton.language")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def _lazy(name: str) -> Callable[..., Any]:
    """The op's launcher; Triton is imported by the first call, and without it the reference stays in place."""
    chosen: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not chosen:
            chosen.append(ops.DEFAULTS[name] if _tell_once_if_unavailable() else _launcher(name))
        return chosen[0](*args)

    return call


def _launcher(name: str) -> Callable[..., Any]:
    return getattr(import_module(f"{__name__}.{name}"), name)


@functools.cache
def _tell_once_if_unavailable() -> bool:
    reason = unavailable()
    if reason:
        warnings.warn(f"innerq: the Triton kernels are off and the slow reference runs instead: {reason}", stacklevel=4)
    return reason is not None
