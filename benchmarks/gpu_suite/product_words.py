"""The two products on integer dot instructions, one query per head: tiles read as words of four codes.

Quantized layouts share everything but where a scale goes. Codes lie in the tiles of :mod:`innerq_compile.layout`;
scales and zeros float16 [heads, blocks, D / 32, 32]. With groups along the *inner* axis (InnerQ) the 32 numbers of a
tile belong to its outer rows and multiply finished dot products; with groups along the *outer* axis (KIVI) they belong
to the inner codes and multiply the vector before it is rounded to 8 bits, once per tile.

LAYOUT is 0 for inner groups, symmetric; 1 for inner groups, hybrid (a scale's sign bit says asymmetric); 2 for outer
groups, asymmetric. Half h of a tile are its outer rows 16 h to 16 h + 15.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves an integer, rounded half to even, in the low bits


@triton.jit
def dot4(codes, x, total, ASM: tl.constexpr):
    """total + sum over the four bytes of codes (unsigned) times x (signed), int32; one instruction where ASM."""
    codes, x = tl.broadcast(codes, x)
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            total += ((codes >> (8 * i)) & 0xFF) * ((x << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def fields(low, high, QUADS: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """Four codes a word, of the inner quads 4 * QUADS .. 4 * QUADS + 3 and one half of the outer rows."""
    codes = (low >> (2 * (2 * QUADS + HALF))) & 0x03030303
    if BITS == 3:
        codes |= ((high >> (4 * QUADS + HALF)) & 0x01010101) << 2
    return codes


@triton.jit
def vector(x_ptrs, factor_ptrs, QUADS: tl.constexpr, INDEX: tl.constexpr, HAS_FACTOR: tl.constexpr):
    """Numbers float32 of a group: those of inner index 16 * QUADS + 4 * quad + INDEX, times their factor."""
    x = tl.load(x_ptrs + 16 * QUADS + INDEX).to(tl.float32)
    if HAS_FACTOR:
        x = x * tl.load(factor_ptrs + 16 * QUADS + INDEX).to(tl.float32)
    return x


@triton.jit
def rounded_vector(x_ptrs, factor_ptrs, HAS_FACTOR: tl.constexpr):
    """Groups of a vector in 8 bits: (words of quads 0-3, words of quads 4-7, step, sum of the rounded group).

    x_ptrs, factor_ptrs: [A, B, 4], first number of each of a group's quads 0-3. Words int32 [A, B, 4], the rest [A, B].
    """
    largest = tl.abs(vector(x_ptrs, factor_ptrs, 0, 0, HAS_FACTOR))
    for j in tl.static_range(1, 8):
        largest = tl.maximum(largest, tl.abs(vector(x_ptrs, factor_ptrs, j // 4, j % 4, HAS_FACTOR)))
    step = tl.max(largest, 2) / 127.0
    inverse = tl.expand_dims(tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0), 2)
    words_a = tl.zeros_like(largest).to(tl.int32)
    words_b = words_a
    sums = words_a
    for i in tl.static_range(4):
        a = (vector(x_ptrs, factor_ptrs, 0, i, HAS_FACTOR) * inverse + _ROUND).to(tl.int32, bitcast=True) & 0xFF
        b = (vector(x_ptrs, factor_ptrs, 1, i, HAS_FACTOR) * inverse + _ROUND).to(tl.int32, bitcast=True) & 0xFF
        words_a |= a << (8 * i)
        words_b |= b << (8 * i)
        sums += ((a << 24) >> 24) + ((b << 24) >> 24)
    return words_a, words_b, step, step * tl.sum(sums, 2).to(tl.float32)


@triton.jit
def load_words(codes_ptr, tile, BITS: tl.constexpr):
    """Words int32 [A, B, 4, 16] of tiles [A, B]: low plane, and high plane brought into step with it (3 bits)."""
    quad = tl.arange(0, 4)[None, None, :, None]
    row = tl.arange(0, 16)[None, None, None, :]
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + (tile * (32 * BITS))[:, :, None, None]
    low = tl.load(words_ptr + quad * 16 + row)
    high = low
    if BITS == 3:
        high = tl.load(words_ptr + 64 + (quad % 2) * 16 + row) >> (2 * (quad // 2))
    return low, high


@triton.jit
def scaled(dots, step, total, scales_ptr, zeros_ptr, tile, HALF: tl.constexpr, LAYOUT: tl.constexpr,
           CENTER: tl.constexpr):  # fmt: skip
    """Contributions float32 [A, B, 16] of tiles [A, B] from their integer dot products [A, B, 16]."""
    y = dots.to(tl.float32) * tl.expand_dims(step, 2)
    if LAYOUT < 2:
        at = (tile * 32)[:, :, None] + HALF * 16 + tl.arange(0, 16)[None, None, :]
        scale = tl.load(scales_ptr + at)
        sums = tl.expand_dims(total, 2)
        if LAYOUT == 0:
            y = scale.to(tl.float32) * (y - CENTER * sums)
        else:
            asymmetric = scale.to(tl.int16, bitcast=True) < 0
            zero = tl.load(zeros_ptr + at, mask=asymmetric, other=0.0).to(tl.float32)
            y = tl.abs(scale.to(tl.float32)) * (y - tl.where(asymmetric, 0.0, CENTER) * sums) + zero * sums
    return y


@triton.jit
def zeros_sum(x_ptrs, zeros_ptrs):
    """Sum over a group of vector times zero, float32 [A, B]; pointers as in :func:`rounded_vector`."""
    total = vector(x_ptrs, zeros_ptrs, 0, 0, True)
    for j in tl.static_range(1, 8):
        total += vector(x_ptrs, zeros_ptrs, j // 4, j % 4, True)
    return tl.sum(total, 2)


@triton.jit
def tile_products(x_ptrs, codes_ptr, scales_ptr, zeros_ptr, tile, BITS: tl.constexpr, LAYOUT: tl.constexpr,
                  CENTER: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Tiles [A, B] times their vectors: float32 [A, B, 16] for each half of the outer rows."""
    quad = (4 * tl.arange(0, 4))[None, None, :]
    at = (tile * 32)[:, :, None] + quad
    words_a, words_b, step, total = rounded_vector(x_ptrs, scales_ptr + at, LAYOUT == 2)
    low, high = load_words(codes_ptr, tile, BITS)
    a, b = tl.expand_dims(words_a, 3), tl.expand_dims(words_b, 3)
    zero = tl.zeros_like(low)
    dots_0 = dot4(fields(low, high, 1, 0, BITS), b, dot4(fields(low, high, 0, 0, BITS), a, zero, ASM), ASM)
    dots_1 = dot4(fields(low, high, 1, 1, BITS), b, dot4(fields(low, high, 0, 1, BITS), a, zero, ASM), ASM)
    y_0 = scaled(tl.sum(dots_0, 2), step, total, scales_ptr, zeros_ptr, tile, 0, LAYOUT, CENTER)
    y_1 = scaled(tl.sum(dots_1, 2), step, total, scales_ptr, zeros_ptr, tile, 1, LAYOUT, CENTER)
    if LAYOUT == 2:
        z = tl.expand_dims(zeros_sum(x_ptrs, zeros_ptr + at), 2)
        y_0, y_1 = y_0 + z, y_1 + z
    return y_0, y_1


@triton.jit(do_not_specialize=["steps"])
def qk_words_kernel(q_ptr, codes_ptr, scales_ptr, zeros_ptr, out_ptr, blocks, steps, TILES: tl.constexpr,
                    BITS: tl.constexpr, LAYOUT: tl.constexpr, CENTER: tl.constexpr, ASM: tl.constexpr,
                    STEP: tl.constexpr,):  # fmt: skip
    """out[h, t] = q[h] . k[h, t]: q float16 [heads, D], out float32 [heads, tokens].

    Grid: (blocks / (STEP * steps), heads); the division leaves no rest. D = 32 * TILES.
    """
    head = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, TILES)[None, :]
    row = tl.arange(0, 16)[None, :]
    q_ptrs = q_ptr + head * (32 * TILES) + (32 * inner)[:, :, None] + (4 * tl.arange(0, 4))[None, None, :]
    for step in tl.range(0, steps):
        block = (tl.program_id(0) * steps + step) * STEP + tl.arange(0, STEP)[:, None]
        tile = (head * blocks + block) * TILES + inner
        x_ptrs = q_ptrs if LAYOUT < 2 else q_ptrs + tl.zeros_like(tile)[:, :, None]
        y_0, y_1 = tile_products(x_ptrs, codes_ptr, scales_ptr, zeros_ptr, tile, BITS, LAYOUT, CENTER, ASM)
        out_ptrs = out_ptr + (head * blocks + block) * 32 + row
        tl.store(out_ptrs, tl.sum(y_0, 1))
        tl.store(out_ptrs + 16, tl.sum(y_1, 1))


@triton.jit(do_not_specialize=["steps"])
def av_words_kernel(p_ptr, codes_ptr, scales_ptr, zeros_ptr, out_ptr, blocks, steps, TILES: tl.constexpr,
                    BITS: tl.constexpr, LAYOUT: tl.constexpr, CENTER: tl.constexpr, ASM: tl.constexpr,
                    STEP: tl.constexpr,):  # fmt: skip
    """out[h, split] = p[h, tokens of the split] . v[h, same tokens]: p float16 [heads, tokens], out float32
    [heads, splits, D]; the caller sums the splits.

    Grid: (blocks / (STEP * steps), heads); the division leaves no rest. D = 32 * TILES.
    """
    head = tl.program_id(1).to(tl.int64)
    outer = tl.arange(0, TILES)[None, :]
    sum_0 = tl.zeros([TILES, 16], tl.float32)
    sum_1 = sum_0
    for step in tl.range(0, steps):
        block = (tl.program_id(0) * steps + step) * STEP + tl.arange(0, STEP)[:, None]
        tile = (head * blocks + block) * TILES + outer
        x_ptrs = p_ptr + ((head * blocks + block) * 32)[:, :, None] + (4 * tl.arange(0, 4))[None, None, :]
        x_ptrs = x_ptrs if LAYOUT < 2 else x_ptrs + tl.zeros_like(tile)[:, :, None]
        y_0, y_1 = tile_products(x_ptrs, codes_ptr, scales_ptr, zeros_ptr, tile, BITS, LAYOUT, CENTER, ASM)
        sum_0 += tl.sum(y_0, 0)
        sum_1 += tl.sum(y_1, 0)
    out_ptrs = out_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * (32 * TILES)
    out_ptrs = out_ptrs + tl.arange(0, TILES)[:, None] * 32 + tl.arange(0, 16)[None, :]
    tl.store(out_ptrs, sum_0)
    tl.store(out_ptrs + 16, sum_1)
