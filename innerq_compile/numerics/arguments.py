"""What the ops may be called with, checked before any memory is touched: one function per op, for every device.

The default implementation and the Triton launchers call these. The C++ kernels check the same facts natively and hand
a call that fails one of them to the default implementation, which raises the message. Nothing here reads a value from
a device, except :func:`check_counts`, which is for the CPU.
"""

from __future__ import annotations

import torch

from innerq_compile.numerics.config import BLOCK, InnerQConfig
from innerq_compile.numerics.layout import (
    PADS,
    QUANTIZED,
    SLOTS,
    LayerState,
    buffer_forms,
    num_blocks,
    unsupported_head_dim,
)


def check_append_kv(
    key: torch.Tensor, value: torch.Tensor, state: LayerState, capacity: int, config: InnerQConfig
) -> None:
    """Refuses what ``append_kv`` cannot take.

    Raises:
        ValueError: Names the operand, what was expected and what came.
    """
    check_state(state, capacity, config)
    batch, heads, _, head_dim = state.k_window.shape
    fits = key.dim() == 4 and key.shape == value.shape
    if not fits or (*key.shape[:2], key.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"keys and values must both have shape [{batch}, {heads}, tokens, {head_dim}] to fit the cache, "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    _check_form("keys", key, state)
    _check_form("values", value, state)


def check_dequantize_kv(state: LayerState, capacity: int, config: InnerQConfig) -> None:
    """Refuses what ``dequantize_kv`` cannot take.

    Raises:
        ValueError: Names the operand, what was expected and what came.
    """
    check_state(state, capacity, config)


def check_decode_attention(
    query: torch.Tensor,
    state: LayerState,
    attn_mask: torch.Tensor | None,
    sm_scale: float,
    capacity: int,
    config: InnerQConfig,
) -> None:
    """Refuses what ``decode_attention`` cannot take.

    Raises:
        ValueError: Names the operand, what was expected and what came.
    """
    check_state(state, capacity, config)
    batch, heads, _, head_dim = state.k_window.shape
    fits = query.dim() == 4 and query.shape[0] == batch and query.shape[3] == head_dim
    if not fits or query.shape[1] % heads or query.shape[1] == 0:
        raise ValueError(
            f"query must have shape [{batch}, a multiple of {heads}, tokens, {head_dim}] to fit the cache, "
            f"got {list(query.shape)}"
        )
    _check_form("query", query, state)
    if attn_mask is not None:
        _check_mask(attn_mask, (*query.shape[:3], capacity), state.k_window.device)


def check_state(state: LayerState, capacity: int, config: InnerQConfig) -> None:
    """Refuses buffers that are not those of one layer with these settings and at least this capacity.

    Number of rows and heads, head_dim and dtype are the key window's, the number of storage blocks is the key codes'.

    Raises:
        ValueError: Names the buffer, what was expected and what came.
    """
    window, codes = state.k_window, state.k_codes
    if window.dim() != 4 or not window.is_floating_point():
        raise ValueError(
            "k_window must be a floating-point tensor [batch, heads, sink + recent + flush, head_dim], "
            f"got {window.dtype} {list(window.shape)}"
        )
    if codes.dim() != 5:
        raise ValueError(
            f"k_codes must have shape [batch, heads, blocks, head_dim / {BLOCK}, {128 * config.key_bits}], "
            f"got {list(codes.shape)}"
        )
    batch, heads, _, head_dim = window.shape
    reason = unsupported_head_dim(config, head_dim)
    if reason:
        raise ValueError(f"k_window: {reason}")
    blocks = codes.shape[2]
    forms = buffer_forms(
        config, batch_size=batch, num_kv_heads=heads, head_dim=head_dim, blocks=blocks, dtype=window.dtype
    )
    for buffer, (name, (shape, dtype)) in zip(state, forms.items(), strict=True):
        if buffer.shape != shape or buffer.dtype != dtype or buffer.device != window.device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {window.device} with the other buffers and settings of this "
                f"cache, got {buffer.dtype} {list(buffer.shape)} on {buffer.device}"
            )
        if not buffer.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(buffer.stride())} for {list(shape)}")
    if capacity < 1 or num_blocks(config, capacity) > blocks:
        raise ValueError(
            f"capacity must be positive and at most what the buffers hold ({blocks} blocks of {BLOCK} packed tokens "
            f"beside the windows), got {capacity}"
        )


def check_counts(state: LayerState, capacity: int, config: InnerQConfig) -> None:
    """Refuses counts that no cache can have: kernels turn them into addresses. Reads them, so only for the CPU.

    Raises:
        ValueError: Names the row and its three counts.
    """
    packed = state.k_codes.shape[2] * BLOCK
    for row, counts in enumerate(state.counts.tolist()):
        slots, quantized, pads = counts[SLOTS], counts[QUANTIZED], counts[PADS]
        behind_sink = max(slots - pads - config.sink, 0)
        fits = 0 <= slots <= capacity and 0 <= pads <= capacity
        fits = fits and 0 <= quantized <= min(behind_sink, packed) and quantized % config.flush_tokens == 0
        if not fits or behind_sink - quantized >= config.ring:
            raise ValueError(
                f"counts of row {row} must be (slots, quantized, pads) of a cache of {capacity} tokens with sink "
                f"{config.sink}, recent {config.recent} and flush {config.flush_tokens}, got {(slots, quantized, pads)}"
            )


def _check_form(name: str, x: torch.Tensor, state: LayerState) -> None:
    """Keys, values and queries have the windows' dtype and lie where the cache lies."""
    window = state.k_window
    if x.dtype != window.dtype or x.device != window.device:
        raise ValueError(
            f"{name} must be {window.dtype} on {window.device} as the cache is, got {x.dtype} on {x.device}"
        )


def _check_mask(mask: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool (True = attend) or floating point (added), got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"attn_mask must lie on {device} as the cache does, got one on {mask.device}")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(given not in (1, wanted) for given, wanted in sizes):
        raise ValueError(
            f"attn_mask must be broadcastable to [batch, heads, query tokens, capacity] = {list(shape)}, "
            f"got {list(mask.shape)}"
        )
