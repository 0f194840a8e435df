"""The two products on tensor cores, several queries per head: tiles read through the package's own tile functions.

LAYOUT and the stored arrays are those of :mod:`gpu_suite.product_words`. Queries are padded to 16 rows. With groups
along the inner axis one matrix product serves several tiles and is scaled afterwards; with groups along the outer axis
each tile needs its own scaled copy of the vectors.
"""

import triton
import triton.language as tl

from innerq_compile.kernels.triton import tiles

ROWS = tl.constexpr(16)


@triton.jit
def rounded(x):
    """8-bit rows of float32 [..., 32] along the last axis, and their steps [..., 1]."""
    step = tl.max(tl.abs(x), len(x.shape) - 1, keep_dims=True) / 127.0
    inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
    return ((x * inverse + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.int8), step


@triton.jit
def inner_tiles(x, codes, scales_ptrs, zeros_ptrs, LAYOUT: tl.constexpr, CENTER: tl.constexpr, INT8: tl.constexpr):
    """float32 [16, N]: vectors float32 [16, 32] times codes int32 [N, 32], scaled by the N outer rows."""
    if INT8:
        xi, step = rounded(x)
        dots = tl.dot(xi, tl.trans(codes.to(tl.int8))).to(tl.float32) * step
        sums = tl.sum(xi.to(tl.int32), 1, keep_dims=True).to(tl.float32) * step
    else:
        dots = tl.dot(x.to(tl.float16), tl.trans(codes.to(tl.float16)))
        sums = tl.sum(x, 1, keep_dims=True)
    scale = tl.load(scales_ptrs)
    s = tl.expand_dims(scale.to(tl.float32), 0)
    if LAYOUT == 0:
        y = s * (dots - CENTER * sums)
    else:
        asymmetric = scale.to(tl.int16, bitcast=True) < 0
        zero = tl.load(zeros_ptrs, mask=asymmetric, other=0.0).to(tl.float32)
        center = tl.expand_dims(tl.where(asymmetric, 0.0, CENTER), 0)
        y = tl.abs(s) * (dots - center * sums) + tl.expand_dims(zero, 0) * sums
    return y


@triton.jit
def outer_tiles(x, codes, scales_ptrs, zeros_ptrs, P: tl.constexpr, INT8: tl.constexpr):
    """float32 [P, 16, 32]: vectors float32 [16, 32] times P tiles of codes int32 [32 * P, 32], scaled by inner codes.

    scales_ptrs, zeros_ptrs: [P, 32].
    """
    factor = tl.expand_dims(tl.load(scales_ptrs).to(tl.float32), 1)
    zero = tl.expand_dims(tl.load(zeros_ptrs).to(tl.float32), 1)
    x = tl.expand_dims(x, 0)
    by_tile = tl.permute(tl.reshape(codes, [P, 32, 32]), [0, 2, 1])
    if INT8:
        xi, step = rounded(x * factor)
        dots = tl.dot(xi, by_tile.to(tl.int8)).to(tl.float32) * step
    else:
        dots = tl.dot((x * factor).to(tl.float16), by_tile.to(tl.float16))
    return dots + tl.sum(x * zero, 2, keep_dims=True)


@triton.jit(do_not_specialize=["steps"])
def qk_matrices_kernel(q_ptr, codes_ptr, scales_ptr, zeros_ptr, out_ptr, blocks, steps, QUERIES: tl.constexpr,
                       TILES: tl.constexpr, BITS: tl.constexpr, LAYOUT: tl.constexpr, CENTER: tl.constexpr,
                       INT8: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """out[h, m, t] = q[h, m] . k[h, t]: q float16 [heads, QUERIES, D], out float32 [heads, QUERIES, tokens].

    Grid: (blocks / (P * steps), heads); the division leaves no rest. D = 32 * TILES.
    """
    head = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, ROWS)
    i = tl.arange(0, 32)
    q_ptrs = q_ptr + (head * QUERIES + m[:, None]) * (32 * TILES) + i[None, :]
    row_ptr = out_ptr + head * QUERIES * (32 * blocks)
    n = tl.arange(0, 32 * P)
    for step in tl.range(0, steps):
        block = head * blocks + (tl.program_id(0) * steps + step) * P
        flat = tl.zeros([ROWS, 32 * P], tl.float32)
        stacked = tl.zeros([P, ROWS, 32], tl.float32)
        for t in tl.static_range(TILES):
            x = tl.load(q_ptrs + 32 * t, mask=m[:, None] < QUERIES, other=0.0).to(tl.float32)
            tile = block * TILES + t
            tile_ptr = codes_ptr + tile * (128 * BITS)
            codes = tiles.load_codes(tile_ptr, TILES * 128 * BITS, 0, BITS, P, 1)
            if LAYOUT < 2:
                at = (tile + n // 32 * TILES) * 32 + n % 32
                flat += inner_tiles(x, codes, scales_ptr + at, zeros_ptr + at, LAYOUT, CENTER, INT8)
            else:
                at = (tile + tl.arange(0, P)[:, None] * TILES) * 32 + i[None, :]
                stacked += outer_tiles(x, codes, scales_ptr + at, zeros_ptr + at, P, INT8)
        token = (tl.program_id(0) * steps + step) * P * 32
        if LAYOUT < 2:
            out_ptrs = row_ptr + m[:, None] * (32 * blocks) + token + n[None, :]
            tl.store(out_ptrs, flat, mask=m[:, None] < QUERIES)
        else:
            p = tl.arange(0, P)[:, None, None]
            out_ptrs = row_ptr + m[None, :, None] * (32 * blocks) + token + p * 32 + i[None, None, :]
            tl.store(out_ptrs, stacked, mask=(m[None, :, None] < QUERIES) & (p < P))


@triton.jit(do_not_specialize=["steps"])
def av_matrices_kernel(p_ptr, codes_ptr, scales_ptr, zeros_ptr, out_ptr, blocks, steps, QUERIES: tl.constexpr,
                       TILES: tl.constexpr, BITS: tl.constexpr, LAYOUT: tl.constexpr, CENTER: tl.constexpr,
                       INT8: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """out[h, split, m] = p[h, m, tokens of the split] . v[h, same tokens]: p float16 [heads, QUERIES, tokens], out
    float32 [heads, splits, QUERIES, D]; the caller sums the splits.

    Grid: (blocks / (P * steps), heads); the division leaves no rest. D = 32 * TILES; P only sets a split's length.
    """
    head = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, ROWS)
    i = tl.arange(0, 32)
    n = tl.arange(0, 32 * TILES)
    p_ptrs = p_ptr + (head * QUERIES + m[:, None]) * (32 * blocks) + i[None, :]
    flat = tl.zeros([ROWS, 32 * TILES], tl.float32)
    stacked = tl.zeros([TILES, ROWS, 32], tl.float32)
    for step in tl.range(0, steps * P):
        block = tl.program_id(0) * (steps * P) + step
        x = tl.load(p_ptrs + 32 * block, mask=m[:, None] < QUERIES, other=0.0).to(tl.float32)
        tile = (head * blocks + block) * TILES
        codes = tiles.load_codes(codes_ptr + tile * (128 * BITS), 128 * BITS, 0, BITS, TILES, 1)
        if LAYOUT < 2:
            at = tile * 32 + n
            flat += inner_tiles(x, codes, scales_ptr + at, zeros_ptr + at, LAYOUT, CENTER, INT8)
        else:
            at = tile * 32 + tl.arange(0, TILES)[:, None] * 32 + i[None, :]
            stacked += outer_tiles(x, codes, scales_ptr + at, zeros_ptr + at, TILES, INT8)
    row_ptr = out_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * (QUERIES * 32 * TILES)
    if LAYOUT < 2:
        tl.store(row_ptr + m[:, None] * (32 * TILES) + n[None, :], flat, mask=m[:, None] < QUERIES)
    else:
        d = tl.arange(0, TILES)[:, None, None]
        out_ptrs = row_ptr + m[None, :, None] * (32 * TILES) + d * 32 + i[None, None, :]
        tl.store(out_ptrs, stacked, mask=(m[None, :, None] < QUERIES) & (d < TILES))
