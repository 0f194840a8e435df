"""What every launcher needs: settings as constexprs, how channels are cut into slices, and which caches are served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from innerq_compile.numerics.config import MODES, InnerQConfig, TensorQuantSpec
from innerq_compile.numerics.layout import LayerState

Launch: TypeAlias = Callable[..., None]
"""``launch(kernel, grid, *args, **options)``: runs a kernel, or records its call in a graph."""

MAX_SLICE = 128
"""Channels that one program handles, at most."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SIZES = (
    "num_new", "capacity", "num_heads", "num_blocks", "num_chunks", "num_splits", "num_window_splits", "out_rows",
)  # fmt: skip
"""Kernel arguments that Triton must not compile in: a cache that grows, or the next prompt, would compile again."""


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel now. Products and sums are not fused, so that every rounding is the reference's."""
    kernel[grid](*args, enable_fp_fusion=False, **options)


def code_constants(prefix: str, spec: TensorQuantSpec) -> dict[str, Any]:
    """What reading codes takes, as constexprs: ``<prefix>_BITS``, ``_MODE`` (index into MODES) and ``_CENTER``."""
    values = {"BITS": spec.bits, "MODE": MODES.index(spec.mode), "CENTER": float(spec.symmetric_center)}
    return {f"{prefix}_{name}": value for name, value in values.items()}


def quant_constants(prefix: str, spec: TensorQuantSpec) -> dict[str, Any]:
    """What making codes takes on top: ``<prefix>_SPAN``, ``_ASYM_MAX_CODE``; the symmetric one is twice the center."""
    return {
        **code_constants(prefix, spec),
        f"{prefix}_SPAN": float(spec.symmetric_span),
        f"{prefix}_ASYM_MAX_CODE": spec.asymmetric_max_code,
    }


def channel_slice(head_dim: int) -> int:
    """Channels per program: the largest power of two that divides ``head_dim``, so whole tiles and whole groups."""
    return min(head_dim & -head_dim, MAX_SLICE)


def serves(state: LayerState) -> bool:
    """Whether the kernels serve a cache of this dtype; the reference serves what they refuse."""
    return state.k_window.dtype in DTYPES


def split(args: tuple[Any, ...]) -> tuple[LayerState, int, InnerQConfig]:
    """The arguments of an op that follow its inputs: buffers, capacity, settings."""
    *buffers, capacity, spec = args
    return LayerState(*buffers), capacity, InnerQConfig.from_spec(spec)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its last axis is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()
