"""Operations on 16-bit tensors, two elements per instruction in PTX, or one by one in plain Triton.

Triton's compiler splits a 16-bit logic operation into elements and puts them together again. Which two elements share a
register does not matter here: every operation does the same to both. A packed shift carries bits from one element into
the other, so the caller masks them off.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _constant(VALUE: tl.constexpr):
    """A 16-bit pattern as int16 [1]."""
    SIGNED: tl.constexpr = VALUE - 65536 if VALUE >= 32768 else VALUE
    return tl.full([1], SIGNED, tl.int16)


@triton.jit
def bits_or(x, MASK: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """``(x & MASK) | BITS`` as float16."""
    if ASM:
        y = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [x, _constant(MASK), _constant(BITS)],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = ((x & _constant(MASK)) | _constant(BITS)).to(tl.float16, bitcast=True)
    return y


@triton.jit
def code_number(x, MASK: tl.constexpr, BITS: tl.constexpr, CENTER: tl.constexpr, ASM: tl.constexpr):
    """:func:`bits_or`, less what BITS are as float16 and less CENTER; as it is where CENTER is None."""
    y = bits_or(x, MASK, BITS, ASM)
    if CENTER is not None:
        less = _constant(_sum_pattern(BITS, CENTER))
        if ASM:
            y = tl.inline_asm_elementwise(
                "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [y, less], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            y -= less.to(tl.float16, bitcast=True)
    return y


@triton.constexpr_function
def _sum_pattern(bits, small):
    """Bit pattern of a power of two, given as its own pattern, plus a smaller number that float16 adds exactly."""
    return bits + int(small * 2 ** (25 - bits // 1024))


@triton.jit
def select_bits(MASK: tl.constexpr, x, y, ASM: tl.constexpr):
    """Bits of x where MASK is set, of y elsewhere."""
    if ASM:
        z = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xe4;", "=r,r,r,r", [x, y, _constant(MASK)],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        z = (x & _constant(MASK)) | (y & ~_constant(MASK))
    return z


@triton.jit
def shift_left(x, count, ASM: tl.constexpr):
    """``x << count``; count is a constant or an int16 tensor."""
    if ASM:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, 31; shl.b32 $0, $1, t; }", "=r,r,r", [x, _as_int16(count)],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = x << _as_int16(count)
    return y


@triton.jit
def shift_right(x, count, ASM: tl.constexpr):
    """``x >> count``; what comes in from the left has no meaning."""
    if ASM:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, 31; shr.b32 $0, $1, t; }", "=r,r,r", [x, _as_int16(count)],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = x >> _as_int16(count)
    return y


@triton.jit
def _as_int16(count):
    """A shift count as an int16 tensor."""
    return tl.full([1], 0, tl.int16) + count
