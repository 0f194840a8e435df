"""Device functions that all kernels share: a row's counts, window slots, and tiles of packed codes.

The byte map of a tile stands in :mod:`innerq_compile.numerics.layout`. Its bit fields follow the binary digits of the
code's place, so a block of codes ``[32 * P, 32 * T]`` (P tiles along the outer axis, T along the inner one) is seen as
eight axes::

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
    fours = tl.expand_dims(load_fours(tiles_ptr, stride_p, stride_t, BITS, P, T, True), 2)
    return tl.reshape((fours >> (8 * tl.arange(0, 4)[None, None, :])) & 0xFF, [32 * P, 32 * T])


@triton.jit
def load_fours(
    tiles_ptr, stride_p, stride_t, BITS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    """Codes in fours, int32 [32 * P, 8 * T], of P x T tiles; strides in bytes between tiles."""
    if BITS == 3:
        codes = _load_plane(tiles_ptr, stride_p, stride_t, 2, P, T, SPLIT_C)
        codes |= _load_plane(tiles_ptr + 256, stride_p, stride_t, 1, P, T, SPLIT_C) << 2
    else:
        codes = _load_plane(tiles_ptr, stride_p, stride_t, BITS, P, T, SPLIT_C)
    return tl.reshape(codes, [32 * P, 8 * T])


@triton.jit
def store_fours(
    tiles_ptr, stride_p, stride_t, codes, BITS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    """Packs codes in fours, int32 [32 * P, 8 * T], into P x T tiles; the inverse of :func:`load_fours`."""
    codes = tl.reshape(codes, [P, 2, 16, T, 2, 2, 2])
    if BITS == 3:
        _store_plane(tiles_ptr, stride_p, stride_t, codes & 0x03030303, 2, P, T, SPLIT_C)
        _store_plane(tiles_ptr + 256, stride_p, stride_t, (codes >> 2) & 0x01010101, 1, P, T, SPLIT_C)
    else:
        _store_plane(tiles_ptr, stride_p, stride_t, codes, BITS, P, T, SPLIT_C)


@triton.jit
def _load_plane(
    tiles_ptr, stride_p, stride_t, WIDTH: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    """Fields of the plane of this width, in fours: int32 [P, 2, 16, T, 2, 2, 2]."""
    HALVES: tl.constexpr = 2 if WIDTH == 8 else 1
    A: tl.constexpr = 2 if WIDTH >= 4 else 1
    B: tl.constexpr = 2 if WIDTH >= 2 else 1
    COLUMNS: tl.constexpr = A * B * HALVES
    ptrs = _column_ptrs(tiles_ptr, stride_p, stride_t, HALVES, P, T, SPLIT_C)
    if SPLIT_C:
        words = _load_columns(ptrs, 16, 2 * COLUMNS)
        words = tl.permute(tl.reshape(words, [T, P, 16, A, B, 2, HALVES]), [0, 1, 5, 2, 3, 4, 6])
    elif HALVES == 2:
        words = tl.join(_load_columns(ptrs, 64, COLUMNS // 2), _load_columns(ptrs + 16, 64, COLUMNS // 2))
    else:
        words = _load_columns(ptrs, 32, COLUMNS)
    words = tl.permute(tl.reshape(words, [T, P, 2, 16, A, B, HALVES]), [1, 6, 3, 0, 4, 5, 2])
    fields = (words >> _field_shifts(WIDTH)) & (0x01010101 * (2**WIDTH - 1) if WIDTH < 8 else -1)
    return tl.broadcast_to(fields, [P, 2, 16, T, 2, 2, 2])


@triton.jit
def _store_plane(
    tiles_ptr, stride_p, stride_t, words, WIDTH: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    """Packs fields in fours, int32 [P, 2, 16, T, 2, 2, 2], each below ``2**WIDTH``."""
    HALVES: tl.constexpr = 2 if WIDTH == 8 else 1
    A: tl.constexpr = 2 if WIDTH >= 4 else 1
    B: tl.constexpr = 2 if WIDTH >= 2 else 1
    COLUMNS: tl.constexpr = A * B * HALVES
    words = words << _field_shifts(WIDTH)
    if WIDTH < 8:
        words = tl.sum(words, 1, keep_dims=True)
    if WIDTH < 4:
        words = tl.sum(words, 4, keep_dims=True)
    if WIDTH < 2:
        words = tl.sum(words, 5, keep_dims=True)
    ptrs = _column_ptrs(tiles_ptr, stride_p, stride_t, HALVES, P, T, SPLIT_C)
    words = tl.permute(words, [3, 0, 6, 2, 4, 5, 1])  # t, p, c, row; a, b, half
    if SPLIT_C:
        words = tl.reshape(tl.permute(words, [0, 1, 3, 4, 5, 2, 6]), [16 * P * T, 2 * COLUMNS])
        _store_columns(ptrs, words, 16)
    elif HALVES == 2:
        first, second = tl.split(tl.reshape(words, [32 * P * T, COLUMNS // 2, 2]))
        _store_columns(ptrs, first, 64)
        _store_columns(ptrs + 16, second, 64)
    else:
        _store_columns(ptrs, tl.reshape(words, [32 * P * T, COLUMNS]), 32)


@triton.jit
def _column_ptrs(
    tiles_ptr, stride_p, stride_t, HALVES: tl.constexpr, P: tl.constexpr, T: tl.constexpr, SPLIT_C: tl.constexpr
):  # fmt: skip
    """Pointers to the words of a plane's first column, in order (t, p, row), or (t, p, c, row) if not SPLIT_C."""
    words_ptr = tiles_ptr.to(tl.pointer_type(tl.int32))
    WORDS: tl.constexpr = 16 if SPLIT_C else 32
    place = tl.arange(0, WORDS * P * T)
    tile = place // WORDS % P * (stride_p // 4) + place // (WORDS * P) * (stride_t // 4)
    in_tile = place % 16
    if not SPLIT_C:
        in_tile += place // 16 % 2 * (16 * HALVES)
    return words_ptr + (tile + in_tile)


@triton.jit
def _load_columns(ptrs, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Words [n, COLUMNS] that :func:`_store_columns` stored."""
    if COLUMNS == 1:
        words = tl.expand_dims(tl.load(ptrs), 1)
    else:
        even = _load_columns(ptrs, 2 * STRIDE, COLUMNS // 2)
        odd = _load_columns(ptrs + STRIDE, 2 * STRIDE, COLUMNS // 2)
        words = tl.reshape(tl.join(even, odd), [ptrs.shape[0], COLUMNS])
    return words


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
def _field_shifts(WIDTH: tl.constexpr):
    """Right shift that brings each field down, int32 [1, half, 1, 1, a, b, 1]; 1 long where a byte holds one field."""
    HALVES: tl.constexpr = 1 if WIDTH == 8 else 2
    A: tl.constexpr = 1 if WIDTH >= 4 else 2
    B: tl.constexpr = 1 if WIDTH >= 2 else 2
    half = tl.arange(0, HALVES)[None, :, None, None, None, None, None]
    a = tl.arange(0, A)[None, None, None, None, :, None, None]
    b = tl.arange(0, B)[None, None, None, None, None, :, None]
    return WIDTH * ((a * B + b) * HALVES + half)
