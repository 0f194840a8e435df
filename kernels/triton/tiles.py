"""Device functions that all kernels share: a row's counts, window slots, and tiles of packed codes.

The byte map of a tile stands in :mod:`innerq_compile.layout`. Its bit fields follow the binary digits of the code's
place, so a block of codes ``[32 * P, 32 * T]`` (P tiles along the outer axis, T along the inner one) is seen as eight
axes::

    [P, half 2, row 16, T, a 2, b 2, c 2, i 4]      outer = 16 * half + row,   inner = 16 a + 8 b + 4 c + i

A field that shares a byte with others is an axis that is summed away (packing) or broadcast (unpacking); the other
axes address the byte. Nothing is shuffled by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_slot(token, SINK: tl.constexpr, RING: tl.constexpr):
    """Index of a token >= 0 in the window buffer: sink tokens in front, then the ring."""
    return tl.where(token < SINK, token, SINK + (token - SINK) % RING)


@triton.jit
def load_codes(tiles_ptr, stride_p, stride_t, BITS: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Codes int32 [32 * P, 32 * T] of P x T tiles; strides in bytes between tiles."""
    if BITS == 3:
        codes = _load_plane(tiles_ptr, stride_p, stride_t, 2, P, T)
        codes |= _load_plane(tiles_ptr + 256, stride_p, stride_t, 1, P, T) << 2
    else:
        codes = _load_plane(tiles_ptr, stride_p, stride_t, BITS, P, T)
    return tl.reshape(codes, [32 * P, 32 * T])


@triton.jit
def store_codes(
    tiles_ptr, stride_p, stride_t, codes, BITS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    """Packs codes in fours, int32 [32 * P, 8 * T], into P x T tiles; the inverse of :func:`load_codes`."""
    codes = tl.reshape(codes, [P, 2, 16, T, 2, 2, 2])
    if BITS == 3:
        _store_plane(tiles_ptr, stride_p, stride_t, codes & 0x03030303, 2, P, T, SPLIT_C)
        _store_plane(tiles_ptr + 256, stride_p, stride_t, (codes >> 2) & 0x01010101, 1, P, T, SPLIT_C)
    else:
        _store_plane(tiles_ptr, stride_p, stride_t, codes, BITS, P, T, SPLIT_C)


@triton.jit
def _load_plane(tiles_ptr, stride_p, stride_t, WIDTH: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Fields of the plane of this width, int32 [P, 2, 16, T, 2, 2, 2, 4]."""
    packed = tl.load(tiles_ptr + _byte_offsets(stride_p, stride_t, WIDTH, P, T)).to(tl.int32)
    fields = (packed >> _field_shifts(WIDTH)) & ((1 << WIDTH) - 1)
    return tl.broadcast_to(fields, [P, 2, 16, T, 2, 2, 2, 4])


@triton.jit
def _store_plane(
    tiles_ptr, stride_p, stride_t, words, WIDTH: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    HALVES: tl.constexpr = 2 if WIDTH == 8 else 1
    A: tl.constexpr = 2 if WIDTH >= 4 else 1
    B: tl.constexpr = 2 if WIDTH >= 2 else 1
    words = words << tl.reshape(_field_shifts(WIDTH), [1, 3 - HALVES, 1, 1, 3 - A, 3 - B, 1])
    if WIDTH < 8:
        words = tl.sum(words, 1, keep_dims=True)
    if WIDTH < 4:
        words = tl.sum(words, 4, keep_dims=True)
    if WIDTH < 2:
        words = tl.sum(words, 5, keep_dims=True)
    words_ptr = tiles_ptr.to(tl.pointer_type(tl.int32))
    COLUMNS: tl.constexpr = A * B * HALVES
    words = tl.permute(words, [3, 0, 6, 2, 4, 5, 1])  # t, p, c, row; a, b, half
    if SPLIT_C:
        place = tl.arange(0, 16 * P * T)
        tile = place // 16 % P * (stride_p // 4) + place // (16 * P) * (stride_t // 4)
        words = tl.reshape(tl.permute(words, [0, 1, 3, 4, 5, 2, 6]), [16 * P * T, 2 * COLUMNS])
        _store_columns(words_ptr + (tile + place % 16), words, 16)
    else:
        place = tl.arange(0, 32 * P * T)
        tile = place // 32 % P * (stride_p // 4) + place // (32 * P) * (stride_t // 4)
        words = tl.reshape(words, [32 * P * T, COLUMNS])
        ptrs = words_ptr + (tile + place // 16 % 2 * (16 * HALVES) + place % 16)
        if HALVES == 2:
            first, second = tl.split(tl.reshape(words, [32 * P * T, COLUMNS // 2, 2]))
            _store_columns(ptrs, first, 64)
            _store_columns(ptrs + 16, second, 64)
        else:
            _store_columns(ptrs, words, 32)


@triton.jit
def _store_columns(ptrs, words, STRIDE: tl.constexpr):
    """Stores words [n, columns], a column at a time so that no word changes threads, STRIDE words from each other."""
    N: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    if COLUMNS == 1:
        tl.store(ptrs, tl.reshape(words, [N]))
    else:
        even, odd = tl.split(tl.reshape(words, [N, COLUMNS // 2, 2]))
        _store_columns(ptrs, even, 2 * STRIDE)
        _store_columns(ptrs + STRIDE, odd, 2 * STRIDE)


@triton.jit
def _byte_offsets(stride_p, stride_t, WIDTH: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Offsets int64 of a plane's bytes; the axes whose fields share a byte have length 1."""
    HALVES: tl.constexpr = 2 if WIDTH == 8 else 1
    A: tl.constexpr = 2 if WIDTH >= 4 else 1
    B: tl.constexpr = 2 if WIDTH >= 2 else 1
    half = tl.arange(0, HALVES)[None, :, None, None, None, None, None, None]
    row = tl.arange(0, 16)[None, None, :, None, None, None, None, None]
    a = tl.arange(0, A)[None, None, None, None, :, None, None, None]
    b = tl.arange(0, B)[None, None, None, None, None, :, None, None]
    c = tl.arange(0, 2)[None, None, None, None, None, None, :, None]
    i = tl.arange(0, 4)[None, None, None, None, None, None, None, :]
    in_tile = (((((a * B + b) * 2 + c) * HALVES + half) * 16 + row) * 4) + i
    p = tl.arange(0, P)[:, None, None, None, None, None, None, None].to(tl.int64)
    t = tl.arange(0, T)[None, None, None, :, None, None, None, None].to(tl.int64)
    return p * stride_p + t * stride_t + in_tile


@triton.jit
def _field_shifts(WIDTH: tl.constexpr):
    """Right shift that brings each field down, over the axes that :func:`_byte_offsets` leaves at length 1."""
    HALVES: tl.constexpr = 1 if WIDTH == 8 else 2
    A: tl.constexpr = 1 if WIDTH >= 4 else 2
    B: tl.constexpr = 1 if WIDTH >= 2 else 2
    half = tl.arange(0, HALVES)[None, :, None, None, None, None, None, None]
    a = tl.arange(0, A)[None, None, None, None, :, None, None, None]
    b = tl.arange(0, B)[None, None, None, None, None, :, None, None]
    return WIDTH * ((a * B + b) * HALVES + half)
