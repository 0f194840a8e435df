"""The key center and key norm of a row, fixed when its first block leaves the window: device functions and kernels.

See :func:`innerq_compile.numerics.quant.key_center_and_norm`: both follow from the smallest and largest key of a
channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.blocks import load_tokens, plan_row
from innerq_compile.kernels.triton.groups import is_finite
from innerq_compile.kernels.triton.launch import SIZES
from innerq_compile.numerics.config import ROPE_PAIRS
from innerq_compile.numerics.quant import KEY_CENTER_MIN_TOKENS, KEY_NORM_EPS

_EPS = tl.constexpr(KEY_NORM_EPS)
_CENTER_MIN_TOKENS = tl.constexpr(KEY_CENTER_MIN_TOKENS)
_HALF, _NO_PAIRS = tl.constexpr(ROPE_PAIRS.index("half")), tl.constexpr(ROPE_PAIRS.index("off"))


@triton.jit
def find_range(
    key_ptr, stride_m, window_ptr, channels, begin, end, held_before, column,
    HEAD_DIM: tl.constexpr, SINK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Smallest and largest finite key per channel of the tokens begin <= t < end; (inf, -inf) where there is none."""
    low = tl.full(channels.shape, float("inf"), tl.float32)
    high = tl.full(channels.shape, float("-inf"), tl.float32)
    for first in range(begin, end, 32):
        t = tl.minimum(tl.arange(0, 32), end - 1 - first)  # what is seen twice changes no range
        x = load_tokens(
            key_ptr,
            stride_m,
            window_ptr,
            first,
            t[:, None],
            0,
            channels[None, :],
            held_before,
            column,
            HEAD_DIM,
            SINK,
            RING,
            32,
        )
        counted = is_finite(x)
        low = tl.minimum(low, tl.min(tl.where(counted, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(counted, x, float("-inf")), 0))
    return low, high


@triton.jit
def rope_partner(channels, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """The channel that RoPE mixes with each one."""
    if PAIRS == _HALF:
        partner = (channels + HEAD_DIM // 2) % HEAD_DIM
    else:
        partner = channels ^ 1
    return partner


@triton.jit
def center_and_norm(low, high, partner_low, partner_high, num_seen, NORM: tl.constexpr, CENTERED: tl.constexpr):
    """Centers and norms from the ranges of ``num_seen`` tokens; without pairs a channel is its own partner."""
    center = tl.zeros_like(low)
    if CENTERED:
        is_known = (low <= high) & (num_seen >= _CENTER_MIN_TOKENS)
        center = tl.where(is_known, 0.5 * low + 0.5 * high, 0.0)
    norm = tl.full(low.shape, 1.0, tl.float32)
    if NORM != 0.0:
        norm = tl.maximum(_magnitude(low, high), _magnitude(partner_low, partner_high))
        if NORM == 0.5:
            norm = tl.sqrt_rn(norm)
        norm = tl.maximum(norm, _EPS)
    return center, norm


@triton.jit
def _magnitude(low, high):
    return tl.where(low <= high, tl.maximum(high, -low), 0.0)


@triton.jit(do_not_specialize=SIZES)
def key_range_kernel(
    k_window_ptr, counts_ptr, key_ptr, ranges_ptr, stride_kb, stride_kh, stride_km,
    num_new, capacity, num_heads,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Ranges of TOKENS keys for the rows whose first block leaves, into float32 [B * H, chunks, 2, D].

    Grid: chunks, slices, B * H.
    """
    RING: tl.constexpr = RECENT + FLUSH
    head = tl.program_id(2).to(tl.int64)
    batch = head // num_heads
    held_before, held, column, first_token, leaving = plan_row(
        counts_ptr + batch * 3, num_new, capacity, SINK, RECENT, FLUSH
    )
    if (first_token == SINK) & (leaving > 0):
        channels = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
        begin = SINK + tl.program_id(0) * TOKENS
        low, high = find_range(
            key_ptr + batch * stride_kb + head % num_heads * stride_kh, stride_km,
            k_window_ptr + head * (SINK + RING) * HEAD_DIM, channels, begin, tl.minimum(begin + TOKENS, held),
            held_before, column, HEAD_DIM, SINK, RING,
        )  # fmt: skip
        range_ptrs = ranges_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * 2 * HEAD_DIM + channels
        tl.store(range_ptrs, low)
        tl.store(range_ptrs + HEAD_DIM, high)


@triton.jit(do_not_specialize=SIZES)
def key_norm_kernel(
    key_norm_ptr, key_center_ptr, counts_ptr, ranges_ptr, num_new, capacity, num_heads, num_chunks,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, FLUSH: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Joins the ranges of :func:`key_range_kernel` and fixes what follows from them. Grid: slices, B * H."""
    head = tl.program_id(1).to(tl.int64)
    held_before, held, column, first_token, leaving = plan_row(
        counts_ptr + head // num_heads * 3, num_new, capacity, SINK, RECENT, FLUSH
    )
    if (first_token == SINK) & (leaving > 0):
        channels = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
        ranges_ptr += head * num_chunks * 2 * HEAD_DIM
        low, high = _join_ranges(ranges_ptr, channels, num_chunks, HEAD_DIM)
        partner_low, partner_high = low, high
        if PAIRS != _NO_PAIRS:
            partner = rope_partner(channels, HEAD_DIM, PAIRS)
            partner_low, partner_high = _join_ranges(ranges_ptr, partner, num_chunks, HEAD_DIM)
        center, norm = center_and_norm(low, high, partner_low, partner_high, held - SINK, NORM, CENTERED)
        tl.store(key_center_ptr + head * HEAD_DIM + channels, center)
        tl.store(key_norm_ptr + head * HEAD_DIM + channels, norm)


@triton.jit
def _join_ranges(ranges_ptr, channels, num_chunks, HEAD_DIM: tl.constexpr):
    low = tl.full(channels.shape, float("inf"), tl.float32)
    high = tl.full(channels.shape, float("-inf"), tl.float32)
    for first in range(0, num_chunks, 16):
        chunk = first + tl.arange(0, 16)[:, None]
        range_ptrs = ranges_ptr + chunk * 2 * HEAD_DIM + channels[None, :]
        low = tl.minimum(low, tl.min(tl.load(range_ptrs, mask=chunk < num_chunks, other=float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(range_ptrs + HEAD_DIM, mask=chunk < num_chunks, other=float("-inf")), 0))
    return low, high
