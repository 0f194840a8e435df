"""Device functions of an append: what it does to a row, where tokens lie, and how they become packed blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.division import normalize
from innerq_compile.kernels.triton.groups import quantize_groups
from innerq_compile.kernels.triton.places import (
    key_places,
    keys_by_token,
    of_channels,
    value_places,
    values_by_channel,
)
from innerq_compile.kernels.triton.tiles import store_fours
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS

_SLOTS, _QUANTIZED, _PADS = tl.constexpr(SLOTS), tl.constexpr(QUANTIZED), tl.constexpr(PADS)


@triton.jit
def plan_row(
    counts_ptr, num_new, capacity, SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr
):  # fmt: skip
    """What an append does to a row: (held before, held after, column of token 0, first to leave, number to leave).

    Of the new columns, token t is number ``t + column``; t below ``held before`` lies in the window. int32 all.
    Columns that do not fit the capacity change nothing, and neither do any that come after: then nothing leaves, and
    held before, which counts what was lost, equals held after.
    """
    slots = tl.load(counts_ptr + _SLOTS).to(tl.int32)
    quantized = tl.load(counts_ptr + _QUANTIZED).to(tl.int32)
    pads = tl.load(counts_ptr + _PADS).to(tl.int32)  # without the ticket of append_kv
    fits = num_new <= capacity - slots
    held_before = tl.maximum(slots - pads, 0)
    held = tl.where(fits, tl.maximum(slots + num_new - pads, 0), held_before)
    leaving = tl.where(fits, tl.maximum(held - SINK - quantized - RECENT, 0) // FLUSH * FLUSH, 0)
    return held_before, held, pads - slots, SINK + quantized, leaving


@triton.jit
def load_tokens(
    new_ptr, stride_m, window_ptr, first_token, t, u, channels, held_before, column,
    HEAD_DIM: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Tokens ``first_token + t + u`` of a head, some stored and some new, as float32.

    Args:
        first_token: The first of UNIT tokens, fewer than the ring holds; none of them is a sink token.
        t, u: Parts of a place below UNIT. Addresses of a thread that differ in ``u`` only are a constant apart.
        channels: Broadcasts with both to the shape of the result.
    """
    num_stored = held_before - first_token
    is_stored = u < num_stored - t
    stride = tl.cast(stride_m, tl.int64)  # torch 2.11 analyses kernels with plain ints for their sizes
    new = new_ptr + (first_token + column) * stride + t * stride + u * stride
    x = tl.load(new + channels, mask=u >= num_stored - t, other=0.0)
    begin = (first_token - SINK) % RING
    window_ptr += SINK * HEAD_DIM
    if RING % UNIT == 0:  # tokens leave in blocks of UNIT: the ring's end never cuts one
        stored = window_ptr + (begin + t) * HEAD_DIM + u * HEAD_DIM
    else:
        slot = begin + t + u
        stored = window_ptr + tl.where(slot < RING, slot, slot - RING) * HEAD_DIM
    return tl.load(stored + channels, mask=is_stored, other=x).to(tl.float32)


@triton.jit
def quantize_keys(
    new_ptr, stride_m, window_ptr, codes_ptr, scales_ptr, zeros_ptr, center, norm,
    first_token, block, first_channel, held_before, column,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    NORMALIZE: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr,
    SPAN: tl.constexpr, ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Quantizes 32 tokens of a head into block ``block`` (counted over all heads), for a slice of channels."""
    T: tl.constexpr = SLICE // 32
    t, u, channels = key_places(T)
    x = load_tokens(
        new_ptr, stride_m, window_ptr, first_token, t, u, first_channel + channels, held_before, column,
        HEAD_DIM, SINK, RING, 32,
    )  # fmt: skip
    x = tl.reshape(x, [2, 4, T, 16, 8])
    if NORMALIZE:
        x = normalize(x, of_channels(center, T), of_channels(norm, T))
    x = keys_by_token(x, T)
    codes, scales, zeros = quantize_groups(
        tl.reshape(x, [32, SLICE // GROUP, GROUP]), MODE, CENTER, SPAN, ASYM_MAX_CODE
    )
    corner = block * HEAD_DIM + first_channel
    store_fours(
        codes_ptr + corner // 32 * (128 * BITS), 0, 128 * BITS, tl.reshape(codes, [32, 8 * T]), BITS, 1, T, True
    )
    rows = tl.arange(0, 32)
    group = corner // GROUP + tl.arange(0, SLICE // GROUP)
    offsets = group[None, :] * 32 + rows[:, None]
    tl.store(scales_ptr + offsets, scales)
    if MODE != 0:
        tl.store(zeros_ptr + offsets, zeros)


@triton.jit
def load_values(
    new_ptr, stride_m, window_ptr, first_token, first_channel, held_before, column,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """What :func:`quantize_values` quantizes, float32 [32, SLICE * max(1, GROUP / 32)]."""
    UNIT: tl.constexpr = max(GROUP, 32)
    t, u, channels = value_places(SLICE // 32, UNIT // 32)
    return load_tokens(
        new_ptr, stride_m, window_ptr, first_token, t, u, first_channel + channels, held_before, column,
        HEAD_DIM, SINK, RING, UNIT,
    )  # fmt: skip


@triton.jit
def quantize_values(
    x, codes_ptr, scales_ptr, zeros_ptr, block, first_channel,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr,
    SPAN: tl.constexpr, ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Quantizes max(32, GROUP) tokens of a head into the blocks from ``block`` on, for a slice of channels."""
    UNIT: tl.constexpr = max(GROUP, 32)
    P: tl.constexpr = SLICE // 32
    T: tl.constexpr = UNIT // 32
    x = values_by_channel(x, P, T)
    codes, scales, zeros = quantize_groups(
        tl.reshape(x, [SLICE, UNIT // GROUP, GROUP]), MODE, CENTER, SPAN, ASYM_MAX_CODE
    )
    tiles_ptr = codes_ptr + (block * HEAD_DIM + first_channel) // 32 * (128 * BITS)
    store_fours(
        tiles_ptr, 128 * BITS, HEAD_DIM // 32 * (128 * BITS), tl.reshape(codes, [SLICE, 8 * T]), BITS, P, T, False
    )
    channels = first_channel + tl.arange(0, SLICE)
    group = block * 32 // GROUP + tl.arange(0, UNIT // GROUP)
    offsets = group[None, :] * HEAD_DIM + channels[:, None]
    tl.store(scales_ptr + offsets, scales)
    if MODE != 0:
        tl.store(zeros_ptr + offsets, zeros)
