"""append_kv: new tokens into the window; blocks that leave it are quantized and packed, all decided on the device.

How much is written follows from ``counts``, which only the device reads. Up to ``flush`` tokens (a decode step) are
one kernel, :func:`append_step_kernel`. More (a prefill) take a wide grid over every block that may leave, in an order
that respects what depends on what: :func:`key_range_kernel` and :func:`key_norm_kernel` fix a row's key center and
norm, :func:`quantize_kernel` reads window and new tokens, :func:`window_kernel` overwrites the window.

The last program of a row to finish writes the row's counts: programs draw a ticket from the upper half of PADS, which
is plain pads again before the kernel ends. So no program can see counts that another one has already moved.
What does not fit the capacity is counted and not stored: SLOTS beyond the capacity marks the row for every read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from innerq_compile import ops
from innerq_compile.kernels.triton.blocks import load_values, plan_row, quantize_keys, quantize_values
from innerq_compile.kernels.triton.key_norm import (
    center_and_norm,
    find_range,
    key_norm_kernel,
    key_range_kernel,
    rope_partner,
)
from innerq_compile.kernels.triton.launch import (
    SIZES,
    Launch,
    channel_slice,
    quant_constants,
    rows_contiguous,
    run,
    serves,
    split,
)
from innerq_compile.kernels.triton.places import warps_of
from innerq_compile.kernels.triton.tiles import window_slot
from innerq_compile.numerics.arguments import check_append_kv
from innerq_compile.numerics.config import BLOCK, ROPE_PAIRS
from innerq_compile.numerics.layout import PADS, QUANTIZED, SLOTS

RANGE_TOKENS = 512
"""Tokens whose smallest and largest keys one program of :func:`key_range_kernel` finds."""

_SLOTS, _QUANTIZED, _PADS = tl.constexpr(SLOTS), tl.constexpr(QUANTIZED), tl.constexpr(PADS)
_TICKET = tl.constexpr(2**32)
_NO_PAIRS = tl.constexpr(ROPE_PAIRS.index("off"))


@triton.jit
def advance_counts(counts_ptr, num_new, column, quantized, programs):
    """Counts the append, once all ``programs`` of the row are here. No program may touch the counts after this.

    What the row held follows from ``column`` (:func:`plan_row`): to read it again would be another trip to memory, by
    threads that nothing keeps behind the one that writes. ``quantized`` includes what leaves now.
    """
    tl.debug_barrier()  # the other warps of this program have read what they need
    ticket = tl.atomic_add(counts_ptr + _PADS, _TICKET, sem="acq_rel")
    if ticket // _TICKET == programs - 1:
        pads = ticket % _TICKET
        tl.store(counts_ptr + _SLOTS, pads - column + num_new)
        tl.store(counts_ptr + _QUANTIZED, quantized)
        tl.store(counts_ptr + _PADS, pads)


@triton.jit
def quantize_unit(
    key_ptr, value_ptr, stride_km, stride_vm, center, norm,
    first_token, block, first_channel, held_before, column,
    k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr, v_codes_ptr, v_scales_ptr, v_zeros_ptr, v_window_ptr,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
    NORMALIZE: tl.constexpr, VALUES_FIRST: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr,
    K_SPAN: tl.constexpr, K_ASYM_MAX_CODE: tl.constexpr,
    V_BITS: tl.constexpr, V_MODE: tl.constexpr, V_CENTER: tl.constexpr,
    V_SPAN: tl.constexpr, V_ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Quantizes keys and values of max(32, GROUP) tokens of a head into the blocks from ``block`` on.

    ``VALUES_FIRST`` asks for the values before the keys are stored, which the compiler does not by itself. It takes up
    to 40 registers.
    """
    if VALUES_FIRST:
        values = load_values(
            value_ptr, stride_vm, v_window_ptr, first_token, first_channel, held_before, column,
            HEAD_DIM, SLICE, GROUP, SINK, RING,
        )  # fmt: skip
    for i in range(max(GROUP, 32) // 32):
        quantize_keys(
            key_ptr, stride_km, k_window_ptr, k_codes_ptr, k_scales_ptr, k_zeros_ptr, center, norm,
            first_token + 32 * i, block + i, first_channel, held_before, column,
            HEAD_DIM, SLICE, GROUP, SINK, RING, NORMALIZE,
            K_BITS, K_MODE, K_CENTER, K_SPAN, K_ASYM_MAX_CODE,
        )  # fmt: skip
    if not VALUES_FIRST:
        values = load_values(
            value_ptr, stride_vm, v_window_ptr, first_token, first_channel, held_before, column,
            HEAD_DIM, SLICE, GROUP, SINK, RING,
        )  # fmt: skip
    quantize_values(
        values, v_codes_ptr, v_scales_ptr, v_zeros_ptr, block, first_channel, HEAD_DIM, SLICE, GROUP,
        V_BITS, V_MODE, V_CENTER, V_SPAN, V_ASYM_MAX_CODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES[1:])  # num_new is 1 at each decode step, and a kernel that knows it is smaller
def append_step_kernel(
    k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr, v_codes_ptr, v_scales_ptr, v_zeros_ptr, v_window_ptr,
    key_norm_ptr, key_center_ptr, counts_ptr,
    key_ptr, value_ptr, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    num_new, capacity, num_heads, num_blocks,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr,
    K_SPAN: tl.constexpr, K_ASYM_MAX_CODE: tl.constexpr,
    V_BITS: tl.constexpr, V_MODE: tl.constexpr, V_CENTER: tl.constexpr,
    V_SPAN: tl.constexpr, V_ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Appends at most FLUSH tokens to one slice of channels of one head, flushing at most once. Grid: slices, B * H."""
    RING: tl.constexpr = RECENT + FLUSH
    NORMALIZE: tl.constexpr = CENTERED or NORM != 0.0
    head = tl.program_id(1).to(tl.int64)
    batch = head // num_heads
    counts_ptr += batch * 3
    key_ptr += batch * stride_kb + head % num_heads * stride_kh
    value_ptr += batch * stride_vb + head % num_heads * stride_vh
    k_window_ptr += head * (SINK + RING) * HEAD_DIM
    v_window_ptr += head * (SINK + RING) * HEAD_DIM
    first_channel = tl.program_id(0) * SLICE
    channels = first_channel + tl.arange(0, SLICE)
    if ROWS == 1:  # the one token of a decode step is asked for before the counts say where it goes
        only_key, only_value = tl.load(key_ptr + channels), tl.load(value_ptr + channels)
    held_before, held, column, first_token, leaving = plan_row(counts_ptr, num_new, capacity, SINK, RECENT, FLUSH)

    if leaving > 0:
        norm_ptrs = key_norm_ptr + head * HEAD_DIM + channels
        center_ptrs = key_center_ptr + head * HEAD_DIM + channels
        norm, center = tl.load(norm_ptrs), tl.load(center_ptrs)
        if NORMALIZE:  # noqa: SIM102, known when compiling: it cannot share an `if` with what the device decides
            if first_token == SINK:
                low, high = find_range(
                    key_ptr, stride_km, k_window_ptr, channels, SINK, held, held_before, column, HEAD_DIM, SINK, RING
                )
                partner_low, partner_high = low, high
                if PAIRS != _NO_PAIRS:
                    partner = rope_partner(channels, HEAD_DIM, PAIRS)
                    partner_low, partner_high = find_range(
                        key_ptr, stride_km, k_window_ptr, partner, SINK, held, held_before, column, HEAD_DIM, SINK, RING
                    )
                center, norm = center_and_norm(low, high, partner_low, partner_high, held - SINK, NORM, CENTERED)
                tl.store(center_ptrs, center)
                tl.store(norm_ptrs, norm)
        block = head * num_blocks + (first_token - SINK) // 32
        UNIT: tl.constexpr = max(GROUP, 32)
        for i in range(FLUSH // UNIT):
            quantize_unit(
                key_ptr, value_ptr, stride_km, stride_vm, center, norm,
                first_token + i * UNIT, block + i * (UNIT // 32), first_channel, held_before, column,
                k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr,
                v_codes_ptr, v_scales_ptr, v_zeros_ptr, v_window_ptr,
                HEAD_DIM, SLICE, GROUP, SINK, RING, NORMALIZE, False,
                K_BITS, K_MODE, K_CENTER, K_SPAN, K_ASYM_MAX_CODE,
                V_BITS, V_MODE, V_CENTER, V_SPAN, V_ASYM_MAX_CODE,
            )  # fmt: skip
        tl.debug_barrier()  # what leaves has been read before it is overwritten

    if ROWS == 1:
        token = tl.zeros_like(channels) - column
        is_kept = (token >= 0) & (token < held)
        slot = window_slot(token, SINK, RING) * HEAD_DIM + channels
        tl.store(k_window_ptr + slot, only_key, mask=is_kept)
        tl.store(v_window_ptr + slot, only_value, mask=is_kept)
    else:
        for first_row in range(0, num_new, ROWS):
            row = first_row + tl.arange(0, ROWS)
            token = row - column
            is_kept = ((token >= 0) & (token < held))[:, None]
            slot = window_slot(token, SINK, RING)[:, None] * HEAD_DIM + channels[None, :]
            row = row.to(tl.int64)[:, None]
            key = tl.load(key_ptr + row * stride_km + channels[None, :], mask=is_kept)
            value = tl.load(value_ptr + row * stride_vm + channels[None, :], mask=is_kept)
            tl.store(k_window_ptr + slot, key, mask=is_kept)
            tl.store(v_window_ptr + slot, value, mask=is_kept)
    quantized = first_token - SINK + leaving
    advance_counts(counts_ptr, num_new, column, quantized, tl.num_programs(0) * num_heads)


@triton.jit(do_not_specialize=SIZES)
def quantize_kernel(
    k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr, v_codes_ptr, v_scales_ptr, v_zeros_ptr, v_window_ptr,
    key_norm_ptr, key_center_ptr, counts_ptr,
    key_ptr, value_ptr, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    num_new, capacity, num_heads, num_blocks,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr,
    K_SPAN: tl.constexpr, K_ASYM_MAX_CODE: tl.constexpr,
    V_BITS: tl.constexpr, V_MODE: tl.constexpr, V_CENTER: tl.constexpr,
    V_SPAN: tl.constexpr, V_ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    """Quantizes max(32, GROUP) leaving tokens of one head and slice. Grid: as many as could leave, slices, B * H."""
    UNIT: tl.constexpr = max(GROUP, 32)
    RING: tl.constexpr = RECENT + FLUSH
    head = tl.program_id(2).to(tl.int64)
    batch = head // num_heads
    held_before, held, column, first_token, leaving = plan_row(
        counts_ptr + batch * 3, num_new, capacity, SINK, RECENT, FLUSH
    )
    offset = tl.program_id(0) * UNIT
    if offset < leaving:
        first_channel = tl.program_id(1) * SLICE
        per_channel = head * HEAD_DIM + first_channel + tl.arange(0, SLICE)
        quantize_unit(
            key_ptr + batch * stride_kb + head % num_heads * stride_kh,
            value_ptr + batch * stride_vb + head % num_heads * stride_vh,
            stride_km, stride_vm, tl.load(key_center_ptr + per_channel), tl.load(key_norm_ptr + per_channel),
            first_token + offset, head * num_blocks + (first_token - SINK + offset) // 32, first_channel,
            held_before, column,
            k_codes_ptr, k_scales_ptr, k_zeros_ptr, k_window_ptr + head * (SINK + RING) * HEAD_DIM,
            v_codes_ptr, v_scales_ptr, v_zeros_ptr, v_window_ptr + head * (SINK + RING) * HEAD_DIM,
            HEAD_DIM, SLICE, GROUP, SINK, RING, NORMALIZE, True,
            K_BITS, K_MODE, K_CENTER, K_SPAN, K_ASYM_MAX_CODE,
            V_BITS, V_MODE, V_CENTER, V_SPAN, V_ASYM_MAX_CODE,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def window_kernel(
    k_window_ptr, v_window_ptr, counts_ptr,
    key_ptr, value_ptr, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    num_new, capacity, num_heads,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    """Fills 32 window slots of one head and slice with the newest tokens that belong there. Grid: slots, slices, B * H.

    Every slot picks its token, so nothing is written twice.
    """
    RING: tl.constexpr = RECENT + FLUSH
    head = tl.program_id(2).to(tl.int64)
    batch = head // num_heads
    counts_ptr += batch * 3
    held_before, held, column, first_token, leaving = plan_row(counts_ptr, num_new, capacity, SINK, RECENT, FLUSH)
    slot = tl.program_id(0) * 32 + tl.arange(0, 32)
    last = held - 1
    newest = last - ((last - slot) % RING + RING) % RING  # of the ring's slots: token t lies in slot t modulo RING
    newest = tl.where(slot < SINK, slot, tl.where(newest >= SINK, newest, -1))
    is_written = (slot < SINK + RING) & (newest >= held_before) & (newest < held)
    is_written = is_written[:, None]
    channels = (tl.program_id(1) * SLICE + tl.arange(0, SLICE))[None, :]
    row = (newest + column).to(tl.int64)[:, None]
    stored = (head * (SINK + RING) + slot)[:, None] * HEAD_DIM + channels
    key_ptr += batch * stride_kb + head % num_heads * stride_kh
    value_ptr += batch * stride_vb + head % num_heads * stride_vh
    tl.store(k_window_ptr + stored, tl.load(key_ptr + row * stride_km + channels, mask=is_written), mask=is_written)
    tl.store(v_window_ptr + stored, tl.load(value_ptr + row * stride_vm + channels, mask=is_written), mask=is_written)
    quantized = first_token - SINK + leaving
    programs = tl.num_programs(0) * tl.num_programs(1) * num_heads
    advance_counts(counts_ptr, num_new, column, quantized, programs)


def append_kv(key: torch.Tensor, value: torch.Tensor, *args: Any, launch: Launch = run) -> None:
    """See :func:`innerq_compile.numerics.reference.append_kv`.

    Raises:
        ValueError: Keys or values do not fit the cache, or its buffers each other.
    """
    state, capacity, config = split(args)
    check_append_kv(key, value, state, capacity, config)
    if not serves(state):
        return ops.DEFAULTS["append_kv"](key, value, *args)
    num_new = key.shape[2]
    if num_new == 0:
        return None
    key, value = rows_contiguous(key), rows_contiguous(value)
    batch, heads, _, head_dim = state.k_window.shape
    width = channel_slice(head_dim)
    slices, rows = head_dim // width, batch * heads
    strides = (*key.stride()[:3], *value.stride()[:3])
    sizes = (num_new, capacity, heads)
    num_blocks = state.k_codes.shape[2]
    flush = config.flush_tokens
    windows = dict(HEAD_DIM=head_dim, SLICE=width, SINK=config.sink, RECENT=config.recent, FLUSH=flush)
    quantizer = {**quant_constants("K", config.key_spec), **quant_constants("V", config.value_spec)}
    has_norm, centered = config.key_norm == "runtime", config.key_center == "runtime"
    normalizer = {
        "NORM": config.key_norm_exponent if has_norm else 0.0,
        "CENTERED": centered,
        "PAIRS": ROPE_PAIRS.index(config.rope_pairs if has_norm else "off"),
    }

    # A norm that looks at another slice's channels must not meet that slice's program overwriting them.
    one_kernel = num_new == 1 or slices == 1 or config.rope_pairs == "off"
    if num_new <= flush and one_kernel:
        launch(
            append_step_kernel, (slices, rows), *state, key, value, *strides, *sizes, num_blocks,
            **windows, GROUP=config.group_size, **normalizer, ROWS=1 if num_new == 1 else 16, **quantizer,
        )  # fmt: skip
        return None

    if has_norm or centered:
        chunks = (num_new + config.ring + RANGE_TOKENS - 1) // RANGE_TOKENS
        ranges = state.key_norm.new_empty((rows, chunks, 2, head_dim))
        launch(
            key_range_kernel, (chunks, slices, rows), state.k_window, state.counts, key, ranges, *strides[:3], *sizes,
            **windows, TOKENS=RANGE_TOKENS,
        )  # fmt: skip
        launch(
            key_norm_kernel, (slices, rows), state.key_norm, state.key_center, state.counts, ranges, *sizes, chunks,
            **windows, **normalizer,
        )  # fmt: skip
    # The window holds less than recent + flush tokens before the append: that bounds the blocks that can leave.
    max_leaving = (num_new + flush - 1) // flush * flush
    unit = max(BLOCK, config.group_size)
    launch(
        quantize_kernel, (max_leaving // unit, slices, rows),
        *state, key, value, *strides, *sizes, num_blocks,
        **windows, GROUP=config.group_size, NORMALIZE=has_norm or centered, **quantizer,
        num_warps=warps_of(width, unit // BLOCK),
    )  # fmt: skip
    launch(
        window_kernel, ((config.sink + config.ring + 31) // 32, slices, rows),
        state.k_window, state.v_window, state.counts, key, value, *strides, *sizes, **windows,
    )  # fmt: skip
    return None
