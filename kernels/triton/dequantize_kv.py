"""dequantize_kv: the whole cache as keys and values, slot by slot.

A program serves 32 slots that hold exactly one storage block of a row (slots are aligned to the row's own blocks, so
left-padded rows cost nothing extra), of one slice of channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from innerq_compile import ops
from innerq_compile.kernels.triton.division import rounded_product
from innerq_compile.kernels.triton.groups import dequantize_groups, load_zeros
from innerq_compile.kernels.triton.launch import (
    SIZES,
    Launch,
    channel_slice,
    code_constants,
    run,
    serves,
    split,
)
from innerq_compile.kernels.triton.places import (
    key_places,
    keys_by_place,
    of_channels,
    value_places,
    values_by_place,
    warps_of,
)
from innerq_compile.kernels.triton.tiles import load_fours, window_slot
from innerq_compile.numerics.arguments import check_dequantize_kv
from innerq_compile.numerics.config import BLOCK
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS

_SLOTS, _QUANTIZED, _PADS = tl.constexpr(SLOTS), tl.constexpr(QUANTIZED), tl.constexpr(PADS)


@triton.jit(do_not_specialize=SIZES)
def dequantize_kv_kernel(
    k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr,
    v_codes_ptr, v_scales_ptr, v_zeros_ptr, v_window_ptr,
    key_norm_ptr, key_center_ptr, counts_ptr, keys_ptr, values_ptr,
    num_heads, num_blocks, capacity,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr,
    V_BITS: tl.constexpr, V_MODE: tl.constexpr, V_CENTER: tl.constexpr,
):  # fmt: skip
    """Writes 32 slots of one head: dequantized, from the window, 0 where no token is, or NaN where tokens were lost."""
    head = tl.program_id(2).to(tl.int64)
    first_channel = tl.program_id(1) * SLICE
    counts_ptr += head // num_heads * 3
    slots = tl.load(counts_ptr + _SLOTS)
    quantized = tl.load(counts_ptr + _QUANTIZED)
    pads = tl.load(counts_ptr + _PADS)
    is_whole = slots <= capacity

    # Packed token i of the row stands in slot pads + SINK + i: this program's slots are those of one whole block.
    first_slot = (pads + SINK) % 32 - 32 + 32 * tl.program_id(0).to(tl.int64)
    first_token = first_slot - pads
    block = (first_token - SINK) // 32
    is_packed = is_whole & (first_token >= SINK) & (first_token - SINK < quantized)

    if is_packed:
        block += head * num_blocks
        tile = (block * HEAD_DIM + first_channel) // 32
        first_out = (head * capacity + first_slot) * HEAD_DIM + first_channel
        T: tl.constexpr = SLICE // 32
        LENGTH: tl.constexpr = min(GROUP, 32)  # a group of 64 or 128 tokens covers several blocks: then one for all

        # All loads before the first store, which the compiler would not move them across.
        k_codes = load_fours(k_codes_ptr + tile * (128 * K_BITS), 0, 128 * K_BITS, K_BITS, 1, T, True)
        v_codes = load_fours(v_codes_ptr + tile * (128 * V_BITS), 128 * V_BITS, 0, V_BITS, T, 1, False)
        group = (block * HEAD_DIM + first_channel) // GROUP + tl.arange(0, SLICE // GROUP)
        offsets = group[None, :] * 32 + tl.arange(0, 32)[:, None]
        k_scales = tl.load(k_scales_ptr + offsets)
        k_zeros = load_zeros(k_zeros_ptr + offsets, k_scales, K_MODE)
        group = block * 32 // GROUP + tl.arange(0, 32 // LENGTH)
        offsets = group[None, :] * HEAD_DIM + first_channel + tl.arange(0, SLICE)[:, None]
        v_scales = tl.load(v_scales_ptr + offsets)
        v_zeros = load_zeros(v_zeros_ptr + offsets, v_scales, V_MODE)
        norm = tl.load(key_norm_ptr + head * HEAD_DIM + first_channel + tl.arange(0, SLICE))
        center = tl.load(key_center_ptr + head * HEAD_DIM + first_channel + tl.arange(0, SLICE))

        codes = tl.reshape(k_codes, [32, SLICE // GROUP, GROUP // 4])
        keys = keys_by_place(dequantize_groups(codes, k_scales, k_zeros, K_MODE, K_CENTER), T)
        keys = rounded_product(keys, of_channels(norm, T)) + of_channels(center, T)
        t, u, channel = key_places(T)
        places = first_out + (t * HEAD_DIM + channel) + u * HEAD_DIM
        tl.store(keys_ptr + places, tl.reshape(keys, [8, 128 * T]).to(keys_ptr.dtype.element_ty))

        codes = tl.reshape(v_codes, [SLICE, 32 // LENGTH, LENGTH // 4])
        values = values_by_place(dequantize_groups(codes, v_scales, v_zeros, V_MODE, V_CENTER), T, 1)
        t, u, channel = value_places(T, 1)
        places = first_out + (t * HEAD_DIM + channel) + u * HEAD_DIM
        tl.store(values_ptr + places, values.to(values_ptr.dtype.element_ty))
    else:
        rows = tl.arange(0, 32)
        channels = first_channel + tl.arange(0, SLICE)
        slot = first_slot + rows
        is_slot = ((slot >= 0) & (slot < capacity))[:, None]
        out = (head * capacity + slot)[:, None] * HEAD_DIM + channels[None, :]
        token = slot - pads
        is_held = ((token >= 0) & (slot < tl.where(is_whole, slots, 0)))[:, None]
        instead = tl.where(is_whole, 0.0, float("nan")).to(k_window_ptr.dtype.element_ty)
        stored = window_slot(token, SINK, RING)
        window = (head * (SINK + RING) + stored)[:, None] * HEAD_DIM + channels[None, :]
        tl.store(keys_ptr + out, tl.load(k_window_ptr + window, mask=is_held, other=instead), mask=is_slot)
        tl.store(values_ptr + out, tl.load(v_window_ptr + window, mask=is_held, other=instead), mask=is_slot)


def dequantize_kv(*args: Any, launch: Launch = run) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`innerq_compile.numerics.reference.dequantize_kv`.

    Raises:
        ValueError: The buffers of the cache do not fit each other.
    """
    state, capacity, config = split(args)
    check_dequantize_kv(state, capacity, config)
    if not serves(state):
        return ops.DEFAULTS["dequantize_kv"](*args)
    batch, heads, _, head_dim = state.k_window.shape
    width = channel_slice(head_dim)
    keys, values = (window.new_empty((batch, heads, capacity, head_dim)) for window in (state.k_window, state.v_window))
    grid = (capacity // BLOCK + 2, head_dim // width, batch * heads)
    launch(
        dequantize_kv_kernel, grid, *state, keys, values, heads, state.k_codes.shape[2], capacity,
        HEAD_DIM=head_dim, SLICE=width, GROUP=config.group_size, SINK=config.sink, RING=config.ring,
        **code_constants("K", config.key_spec), **code_constants("V", config.value_spec), num_warps=warps_of(width),
    )  # fmt: skip
    return keys, values
