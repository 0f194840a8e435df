"""Triton kernels for CUDA and ROCm (torch calls both devices ``cuda``): append_kv, dequantize_kv, decode_attention.

Importing this package imports no Triton; the first op on such a device does, through :func:`unavailable`. A call of an
op then runs its launcher, registered under the CUDA key. In a graph on its way into Inductor the op is decomposed into
its kernels instead (:func:`register_decompositions`), as ``torch.library.triton_op`` would do it: Inductor puts the
kernels into its own code, sees which buffers they write, and packs them into an AOTInductor package, which then needs
neither Python nor this project. Why not a ``triton_op``: it decomposes on every device, past the C++ kernels, and the
passes match ops that exist before any Triton is imported.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from innerq_compile import ops
from innerq_compile.compat import pytorch
from innerq_compile.numerics.layout import LayerState

__all__ = ["description", "register_decompositions", "unavailable"]

OPS: dict[str, int] = {"append_kv": 2, "dequantize_kv": 0, "decode_attention": 1}
"""Ops that have kernels here -> their arguments before the cache's buffers, tensors all. The module of an op's name
holds the launcher of that name, with the op's arguments."""

_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


@functools.cache
def register_decompositions() -> None:
    """Lets AOTAutograd see kernels in place of ops; a second call does nothing. Imports much, as compiling does."""
    mode = pytorch.functional_tensor_mode()
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name in OPS:
        torch.library.register_torch_dispatch(f"{ops.NAMESPACE}::{name}", mode, decompose, lib=library)
    _libraries.append(library)


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run here, or ``None`` when they can (this imports Triton and attaches them)."""
    try:
        launchers = {name: _launcher(name) for name in OPS}
    except ImportError as error:
        reason = f"Triton cannot be imported: {error}"
        warnings.warn(f"innerq: the Triton kernels are off and the slow reference runs instead: {reason}", stacklevel=4)
        return reason
    library = torch.library.Library(ops.NAMESPACE, "IMPL", "CUDA")
    for name, launcher in launchers.items():
        library.impl(name, launcher)
    _libraries.append(library)
    return None


def description() -> str:
    """Which kernels a GPU runs, in words, or the reason why there are none."""
    reason = unavailable()
    return f"reference, because {reason}" if reason else f"Triton {import_module('triton').__version__}"


def decompose(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Replaces an op on a GPU by its kernels while AOTAutograd traces; elsewhere, and in torch.export, keeps it."""
    name = op.name().split("::")[1].split(".")[0]
    if not is_on_gpu(args) or pytorch.exports_keep_triton_ops() or unavailable() or not _serves(name, args):
        return mode.__torch_dispatch__(op, types, args, kwargs or {})
    with mode:
        return _launcher(name)(*args, **(kwargs or {}), launch=record)


def is_on_gpu(args: tuple[Any, ...]) -> bool:
    """Whether an op's tensors lie on a device that these kernels serve."""
    return next(x.device.type for x in args if isinstance(x, torch.Tensor)) == "cuda"


def _serves(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the kernels serve this call. What they leave to the reference stays an op: it cannot be traced."""
    from innerq_compile.kernels.triton.launch import serves

    first = OPS[name]
    return serves(LayerState(*args[first : first + len(LayerState._fields)]))


def record(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Puts the launch of a kernel into the graph that is being traced.

    Inductor compiles it with products and sums fused, which an own launch may forbid. An append gives the same bits
    either way: every product that it adds to is exact in float32 (a half, or a code of 8 bits times a float16 scale).
    """
    torch.library.wrap_triton(kernel)[grid](*args, **options)


def _launcher(name: str) -> Callable[..., Any]:
    return getattr(import_module(f"{__name__}.{name}"), name)
