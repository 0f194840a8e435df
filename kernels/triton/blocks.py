"""Device functions of an append: what it does to a row, where tokens lie, and how they become packed blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.groups import quantize_groups
from innerq_compile.kernels.triton.tiles import store_codes, window_slot
from innerq_compile.layout import PADS, QUANTIZED, SLOTS

_SLOTS, _QUANTIZED, _PADS = tl.constexpr(SLOTS), tl.constexpr(QUANTIZED), tl.constexpr(PADS)


@triton.jit
def plan_row(
    counts_ptr, num_new, capacity, SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr
):  # fmt: skip
    """What an append does to a row: (held before, held after, column of token 0, first to leave, number to leave).

    Of the new columns, token t is number ``t + column``; t below ``held before`` lies in the window. int32 all.
    """
    slots = tl.load(counts_ptr + _SLOTS).to(tl.int32)
    quantized = tl.load(counts_ptr + _QUANTIZED).to(tl.int32)
    pads = tl.load(counts_ptr + _PADS).to(tl.int32)  # without the ticket of append_kv
    fitting = tl.minimum(num_new, tl.maximum(capacity - slots, 0))
    held_before = tl.maximum(slots - pads, 0)
    held = tl.maximum(slots + fitting - pads, 0)
    leaving = tl.maximum(held - SINK - quantized - RECENT, 0) // FLUSH * FLUSH
    return held_before, held, pads - slots, SINK + quantized, leaving


@triton.jit
def load_tokens(
    new_ptr, stride_m, window_ptr, token, channels, held_before, column,
    HEAD_DIM: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Tokens [T] of a head, some stored and some new, as float32 [T, channels]."""
    is_new = (token >= held_before)[:, None]
    row = (token + column).to(tl.int64)[:, None]
    new = tl.load(new_ptr + row * stride_m + channels[None, :], mask=is_new, other=0.0)
    slot = window_slot(token, SINK, RING)[:, None]
    stored = tl.load(window_ptr + slot * HEAD_DIM + channels[None, :], mask=token[:, None] < held_before, other=0.0)
    return tl.where(is_new, new, stored).to(tl.float32)


@triton.jit
def quantize_keys(
    new_ptr, stride_m, window_ptr, codes_ptr, scales_ptr, zeros_ptr, center, norm,
    first_token, block, first_channel, held_before, column,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    NORMALIZE: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr,
    SPAN: tl.constexpr, MAX_CODE: tl.constexpr, ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Quantizes 32 tokens of a head into block ``block`` (counted over all heads), for a slice of channels."""
    rows = tl.arange(0, 32)
    channels = first_channel + tl.arange(0, SLICE)
    x = load_tokens(
        new_ptr, stride_m, window_ptr, first_token + rows, channels, held_before, column, HEAD_DIM, SINK, RING
    )
    if NORMALIZE:
        x = tl.div_rn(x - center[None, :], norm[None, :])
    codes, scales, zeros = quantize_groups(
        tl.reshape(x, [32, SLICE // GROUP, GROUP]), MODE, CENTER, SPAN, MAX_CODE, ASYM_MAX_CODE
    )
    corner = block * HEAD_DIM + first_channel
    store_codes(codes_ptr + corner // 32 * (128 * BITS), 0, 128 * BITS, codes, BITS, 1, SLICE // 32)
    group = corner // GROUP + tl.arange(0, SLICE // GROUP)
    offsets = group[None, :] * 32 + rows[:, None]
    tl.store(scales_ptr + offsets, scales)
    if MODE != 0:
        tl.store(zeros_ptr + offsets, zeros)


@triton.jit
def quantize_values(
    new_ptr, stride_m, window_ptr, codes_ptr, scales_ptr, zeros_ptr,
    first_token, block, first_channel, held_before, column,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    BITS: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr,
    SPAN: tl.constexpr, MAX_CODE: tl.constexpr, ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Quantizes max(32, GROUP) tokens of a head into the blocks from ``block`` on, for a slice of channels."""
    UNIT: tl.constexpr = max(GROUP, 32)
    channels = first_channel + tl.arange(0, SLICE)
    x = load_tokens(
        new_ptr, stride_m, window_ptr, first_token + tl.arange(0, UNIT), channels, held_before, column,
        HEAD_DIM, SINK, RING,
    )  # fmt: skip
    codes, scales, zeros = quantize_groups(
        tl.reshape(tl.trans(x), [SLICE, UNIT // GROUP, GROUP]), MODE, CENTER, SPAN, MAX_CODE, ASYM_MAX_CODE
    )
    tiles_ptr = codes_ptr + (block * HEAD_DIM + first_channel) // 32 * (128 * BITS)
    store_codes(tiles_ptr, 128 * BITS, HEAD_DIM // 32 * (128 * BITS), codes, BITS, SLICE // 32, UNIT // 32)
    group = block * 32 // GROUP + tl.arange(0, UNIT // GROUP)
    offsets = group[None, :] * HEAD_DIM + channels[:, None]
    tl.store(scales_ptr + offsets, scales)
    if MODE != 0:
        tl.store(zeros_ptr + offsets, zeros)
