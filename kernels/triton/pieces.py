"""Products of 16-bit numbers with float32 numbers in 16-bit matrix units: rounded, or exact in three pieces.

A float32 number rounded to 16 bits loses 13 or 16 of its 24. Cut into three it loses nothing that a float32 sum would
keep. In float16 the first piece has the 11 leading bits, the second 11 of what is left, and the last one ends at
``2**-25``, where the largest number is between :data:`LARGEST` and twice that. In bfloat16 each has 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.operands import outer_to_inner

LARGEST = tl.constexpr(2.0**14)
"""Numbers to be cut must be smaller than twice this. Sums of 32 of them times float16 numbers are far from overflow."""


@triton.jit
def pieces_of(x, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """x float32 as a tuple of numbers of a type that add up to it, the largest first: three if EXACT, else one."""
    first = x.to(DTYPE)
    pieces = (first,)
    if EXACT:
        rest = x - first.to(tl.float32)
        second = rest.to(DTYPE)
        pieces += (second, (rest - second.to(tl.float32)).to(DTYPE))
    return pieces


@triton.jit
def power_of_two(x):
    """The largest power of two that is not larger than x > 0, by the bits of its exponent; 0 for subnormal numbers."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def repeat_pieces(pieces, NB: tl.constexpr, RT: tl.constexpr):
    """Pieces [32, RT] of what is the same for NB blocks, as [NB, 32, RT]."""
    repeated = ()
    for i in tl.static_range(len(pieces)):
        repeated += (tl.broadcast_to(pieces[i][None, :, :], [NB, 32, RT]),)
    return repeated


@triton.jit
def pieces_outer_to_inner(pieces, NB: tl.constexpr, RT: tl.constexpr):
    """Pieces [NB, 32, RT] in the order in which a product sums over them; see :func:`outer_to_inner`."""
    reordered = ()
    for i in tl.static_range(len(pieces)):
        reordered += (outer_to_inner(pieces[i], NB, RT),)
    return reordered


@triton.jit
def times_pieces(x, pieces, start):
    """``start + x @ sum(pieces)`` in float32, the smallest pieces first."""
    products = start
    for i in tl.static_range(len(pieces)):
        products = tl.dot(x, pieces[len(pieces) - 1 - i], products, input_precision="ieee")
    return products
