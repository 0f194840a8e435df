"""What every launcher needs: settings as constexprs, how channels are cut into slices, and which caches are served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from innerq_compile.config import MODES, InnerQConfig, TensorQuantSpec
from innerq_compile.layout import LayerState

Launch: TypeAlias = Callable[..., None]
"""``launch(kernel, grid, *args, **options)``: runs a kernel, or records its call in a graph."""

MAX_SLICE = 128
"""Channels that one program handles, at most."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel now. Products and sums are not fused, so that every rounding is the reference's."""
    kernel[grid](*args, enable_fp_fusion=False, **options)


def code_constants(prefix: str, spec: TensorQuantSpec) -> dict[str, Any]:
    """What reading codes takes, as constexprs: ``<prefix>_BITS``, ``_MODE`` (index into MODES) and ``_CENTER``."""
    values = {"BITS": spec.bits, "MODE": MODES.index(spec.mode), "CENTER": float(spec.symmetric_center)}
    return {f"{prefix}_{name}": value for name, value in values.items()}


def channel_slice(head_dim: int) -> int:
    """Channels per program: the largest power of two that divides ``head_dim``, so whole tiles and whole groups."""
    return min(head_dim & -head_dim, MAX_SLICE)


def unsupported(state: LayerState) -> str | None:
    """Why the kernels do not serve these buffers, or ``None`` when they do; the reference serves what they refuse."""
    if state.k_window.dtype not in DTYPES:
        return f"the Triton kernels know float32, bfloat16 and float16 models, not {state.k_window.dtype}"
    scattered = [name for name, buffer in state._asdict().items() if not buffer.is_contiguous()]
    if scattered:
        return f"the Triton kernels want contiguous buffers; not contiguous: {', '.join(scattered)}"
    return None


def split(args: tuple[Any, ...]) -> tuple[LayerState, int, InnerQConfig]:
    """The arguments of an op that follow its inputs: buffers, capacity, settings."""
    *buffers, capacity, spec = args
    return LayerState(*buffers), capacity, InnerQConfig.from_spec(spec)
