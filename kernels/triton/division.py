"""Device functions for correctly rounded quotients: one reciprocal for many numbers instead of a division for each.

An IEEE division is ten instructions and a branch on an NVIDIA GPU. Here a divisor is shared by a channel or by a group,
so each number takes two or three, and the quotient is the one that :mod:`innerq_compile.numerics.quant` rounds, bit
for bit. Every fused multiply-add is explicit: the compiler may not have the right to make them, and must not make
others of a product that is meant to be rounded.

What the proofs below rest on: the quotient of x, with 24 significant bits, and d, with p of them, never lies on the
midpoint m between two neighbouring floats (m has 25 bits and is odd, so m * d has at least 25), and since x - m * d is
a multiple of the last places of m and d, it keeps a distance of more than ``2**-(25 + p)`` from each, relatively.

*Tiny* numbers may come out with another rounding: below ``2**-91`` as keys, below ``2**-60`` as multiples of a scale.
They change nothing that is stored. A stored scale is 0 or at least ``2**-24``, so such a number gets the code of 0,
moves no scale and no zero, and adds the same to the errors of both arms of a hybrid group.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGE_NORM = tl.constexpr(2.0**64)
_FACTOR, _FACTOR_OF_LARGE = tl.constexpr(2.0**11), tl.constexpr(2.0**-64)


@triton.jit
def normalize(keys, center, norm):
    """``(keys - center) / norm`` in float32, each step rounded to nearest; whatever is not finite stays so.

    With ``r = RN(1 / n)`` and ``q = RN(y * r)``, ``RN(q + r * (y - q * n))`` is ``RN(y / n)`` (Markstein 1990), unless
    something under- or overflows. Why also for a q that is one float further off than the theorem allows: take y and n
    in [1, 2). Before the last rounding, the error is ``|y / n - q| * |1 - n * r|``; r is within ``2**-25`` of 1 / n. If
    y >= n, then q is within one unit of the quotient's last place, as the theorem asks. Else it is within 1.5 units,
    and the result could be wrong only if ``y / n`` were within ``2**-23`` units of a midpoint and 1.5 - ``2**-23`` or
    more from q. That takes ``y > 2 - 2**-22``, so ``y = 2 - 2**-23``; but then no n in [1, 2) is larger.

    Norms are at least ``2**-10`` (quant.KEY_NORM_EPS) and scaled by a power of two, so that neither q overflows where
    the quotient does not, nor the reciprocal loses bits where it is subnormal. The quotient is scaled back last.

    Args:
        keys: float32; center and norm, float32, broadcast to them. The reciprocal has the shape of ``norm``.
    """
    factor = tl.where(norm >= _LARGE_NORM, _FACTOR_OF_LARGE, _FACTOR)
    n = norm * factor
    inverse = tl.div_rn(1.0, n)
    y = keys - center
    q = y * inverse
    return tl.fma(tl.fma(-q, n, y), inverse, q) * factor


@triton.jit
def rounded_product(x, y):
    """``x * y``, rounded even where a sum follows and the compiler may fuse the two."""
    return tl.fma(x, y, 0.0)


@triton.jit
def divide_by_scales(x, scales):
    """``x / scales`` in float32, and 0 wherever the scale is 0.

    The reciprocal of a scale is a float and the rest that it lacks: ``1 / s = inverse + rest`` to within ``2**-46``.
    Both products are added in one rounding. A scale has 11 bits, so the error is far below the distance ``2**-36`` of
    any quotient from a midpoint; for the same reason one step of Newton's makes ``inverse = RN(1 / s)`` of an
    approximation that need only be good to ``2**-19``. Nothing overflows: what is divided belongs to the group that
    the scale was made from, so a quotient beyond ``2**48`` means a saturated scale, of 65504.

    Args:
        x: float32, finite.
        scales: float16 values >= 0 as float32; they broadcast to x.
    """
    s = tl.where(scales > 0, scales, 1.0)
    inverse = 1.0 / s
    inverse = tl.fma(tl.fma(-s, inverse, 1.0), inverse, inverse)
    rest = tl.fma(-s, inverse, 1.0) * inverse
    inverse = tl.where(scales > 0, inverse, 0.0)
    rest = tl.where(scales > 0, rest, 0.0)
    return tl.fma(x, inverse, x * rest)


@triton.jit
def divide_by_integer(x, DIVISOR: tl.constexpr):
    """``x / DIVISOR`` for finite x, and a divisor of at most 8 bits; what is below ``2**-30`` may round otherwise.

    One step as in :func:`normalize`. Its error is below ``2**-46``, and no quotient is within ``2**-33`` of a midpoint.
    """
    INVERSE: tl.constexpr = 1.0 / DIVISOR
    q = x * INVERSE
    return tl.fma(tl.fma(-q, DIVISOR, x), INVERSE, q)
