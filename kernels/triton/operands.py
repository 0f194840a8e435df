"""Packed tiles as matrix operands: codes become float16 numbers by OR-ing them into a constant, never by conversion.

A code that stands at bit p of a byte and is OR-ed into the float16 ``2**(10 - p)`` makes ``2**(10 - p) + code``: bit p
of its mantissa is worth 1. Two codes of a 32-bit register take one such instruction. The constants leave the product
again through the start value of its accumulator.

The 32 rows and the 32 columns of an operand are the tile's outer and inner axis in *operand order*: position
``16 a + 8 c + b`` holds index ``16 a + 2 b + c`` (:func:`place`). In that order the two halves of a register hold codes
of the same byte of two words, a thread's words lie side by side, and every field of a word lands in the thread that
loaded it: no code ever crosses to another thread.

For the inner axis that holds where a thread has positions in twos. Triton before 3.8 takes codes that pass a join for
half as wide as they are, and deals out inner positions in fours; there position ``16 a + 4 w + 2 c + b`` holds inner
index ``16 a + 4 w + 2 b + c`` (:func:`inner_place`), which gives each thread the same codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.packed_ops import code_number, select_bits, shift_left, shift_right

_INNER_FOURS = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8))
"""Whether a thread's inner positions are four in a row."""


@triton.jit
def place(position):
    """Outer index of a tile that stands at ``position`` of an operand; also for several tiles in a row."""
    return (position & -16) | ((position & 7) << 1) | ((position >> 3) & 1)


@triton.jit
def inner_place(position):
    """Inner index of a tile that stands at ``position`` of an operand."""
    if _INNER_FOURS:
        index = (position & -4) | ((position & 1) << 1) | ((position >> 1) & 1)
    else:
        index = place(position)
    return index


@triton.jit
def outer_to_inner(x, NB: tl.constexpr, RT: tl.constexpr):
    """[NB, 32, RT] with the middle axis in the order of an operand's rows, brought to that of its columns."""
    if _INNER_FOURS:
        x = tl.permute(tl.reshape(x, [NB, 2, 2, 4, 2, RT]), [0, 1, 3, 2, 4, 5])
        x = tl.reshape(x, [NB, 32, RT])
    return x


@triton.jit
def _inner_order(x, NB: tl.constexpr):
    """[NB, halves, rows, part 2, word 4, pair 2, parity 2] to [NB, 32 outer, 32 inner] in operand order."""
    if _INNER_FOURS:
        x = tl.permute(x, [0, 1, 2, 3, 4, 6, 5])
    else:
        x = tl.permute(x, [0, 1, 2, 3, 6, 4, 5])
    return tl.reshape(x, [NB, 32, 32])


@triton.jit
def code_offset(position, half, BITS: tl.constexpr):
    """What the constants add to a code of inner ``position`` and outer half (0 or 1), float32."""
    if BITS == 8:
        offset = tl.where(position < 32, 512.0, 0.0) + half * 0.0
    elif BITS == 4:
        offset = tl.where(position < 32, 512.0, 0.0) - half * 448.0
    else:
        offset = tl.where(position < 16, 512.0, 32.0) + half * 0.0
    return offset


@triton.jit
def operand_words(codes_ptr, tile_offsets, BITS: tl.constexpr):
    """Pointers [NB, W] to the int16 words of NB tiles, and to those of their 1-bit plane, each word of it twice.

    Args:
        codes_ptr: int16 pointer.
        tile_offsets: int64 [NB], where each tile begins, in words.
    """
    WORDS: tl.constexpr = 128 if BITS < 4 else 64 * BITS
    words = (codes_ptr + tl.arange(0, WORDS))[None, :] + tile_offsets[:, None]
    return words, (codes_ptr + 128 + tl.arange(0, 128) % 64)[None, :] + tile_offsets[:, None]


@triton.jit
def load_operand(
    words, high_words, high_shifts, BITS: tl.constexpr, CENTER: tl.constexpr, NB: tl.constexpr, ASM: tl.constexpr
):
    """NB tiles as float16 [NB, 32 outer, 32 inner] in operand order: each code plus its :func:`code_offset`.

    Args:
        CENTER: If not None: each code less this, which takes one operation more for every two of them.
        words, high_words: See :func:`operand_words`.
        high_shifts: See :func:`load_high_shifts`.
        ASM: Two codes per instruction, in PTX; otherwise plain Triton, one code at a time.
    """
    if BITS == 8:
        x = tl.permute(tl.reshape(tl.load(words), [NB, 2, 4, 2, 8, 2, 2]), [0, 3, 5, 4, 1, 2, 6])
        x = tl.reshape(x, [NB, 32, 2, 8])
        even = code_number(shift_left(x, 1, ASM), 0x01FE, 0x6000, CENTER, ASM)
        odd = code_number(shift_right(x, 7, ASM), 0x01FE, 0x6000, CENTER, ASM)
        operand = tl.reshape(tl.join(even, odd), [NB, 1, 32, 2, 4, 2, 2])
    elif BITS == 4:
        x = tl.permute(tl.reshape(tl.load(words), [NB, 2, 4, 8, 2, 2]), [0, 4, 3, 1, 2, 5])
        x = tl.reshape(x, [NB, 16, 2, 8])
        low_even = code_number(shift_left(x, 1, ASM), 0x001E, 0x6000, CENTER, ASM)
        low_odd = code_number(shift_right(x, 7, ASM), 0x001E, 0x6000, CENTER, ASM)
        high_even = code_number(x, 0x00F0, 0x5400, CENTER, ASM)
        high_odd = code_number(shift_right(x, 8, ASM), 0x00F0, 0x5400, CENTER, ASM)
        operand = tl.join(tl.join(low_even, low_odd), tl.join(high_even, high_odd))
        operand = tl.permute(tl.reshape(operand, [NB, 16, 2, 4, 2, 2, 2]), [0, 6, 1, 2, 3, 4, 5])
    else:
        x = _load_quads(words, NB)
        # Both parts of one half per word: bits 1.. and 5.. of each byte.
        low, high = shift_left(x, 1, ASM), shift_right(x, 1, ASM)
        if BITS == 3:
            h = _load_quads(high_words, NB)
            shifts = high_shifts[None, None, :]
            low = select_bits(0x6666, low, shift_left(h, shifts, ASM), ASM)
            high = select_bits(0x6666, high, shift_left(h, shifts - 1, ASM), ASM)
        low = _both_parities(low, BITS, CENTER, ASM)
        high = _both_parities(high, BITS, CENTER, ASM)
        operand = tl.reshape(tl.join(low, high), [NB, 16, 4, 2, 2, 2, 2])
        operand = tl.permute(operand, [0, 6, 1, 5, 2, 3, 4])
    return _inner_order(operand, NB)


@triton.jit
def load_high_shifts(any_int16_ptr, slots):
    """int16 [8]: how far left a 1-bit plane's word goes, per column of a word pair, before its bits stand at 3 and 7.

    Lanes that share a word of that plane want different bits of it. The numbers come as the default of a load that is
    masked off (``slots`` is never negative, but who compiles does not know): Triton moves a change of layout up to the
    loads, and gives up, shuffling all the unpacked codes, at a number that comes from anywhere else.
    """
    column = tl.arange(0, 8)
    numbers = (3 - column // 4 * 2).to(tl.int16)
    return tl.load(any_int16_ptr + column, mask=column + slots < 0, other=numbers)


@triton.jit
def _load_quads(words, NB: tl.constexpr):
    """A plane of four word columns: int16 [NB, 16 outer, 8 (word, pair)] in operand order."""
    return tl.reshape(tl.permute(tl.reshape(tl.load(words), [NB, 4, 8, 2, 2]), [0, 3, 2, 1, 4]), [NB, 16, 8])


@triton.jit
def _both_parities(words, BITS: tl.constexpr, CENTER: tl.constexpr, ASM: tl.constexpr):
    """Even and odd bytes, both parts: float16 [NB, 16, 8, parity 2, part 2]."""
    MASK: tl.constexpr = 0x06 if BITS == 2 else 0x0E
    odd = shift_right(words, 8, ASM)
    first = tl.join(code_number(words, MASK, 0x6000, CENTER, ASM), code_number(odd, MASK, 0x6000, CENTER, ASM))
    second = tl.join(
        code_number(words, MASK << 4, 0x5000, CENTER, ASM), code_number(odd, MASK << 4, 0x5000, CENTER, ASM)
    )
    return tl.join(first, second)
