"""Device functions between numbers and codes of whole groups, rounded as :mod:`innerq_compile.numerics.quant` says.

Bit for bit without any compiler option: quotients and roots round to nearest (:mod:`.division`), a product that a sum
follows is exact (11 bits of a scale times 9 of a code), so fusing the two changes nothing, and sums halve their axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.division import divide_by_integer, divide_by_scales

_FP32_MAX = tl.constexpr(3.4028234663852886e38)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_FP16_MAX = tl.constexpr(65504.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves an integer, rounded half to even, in the low bits
_TWO_23, _TWO_23_BITS = tl.constexpr(8388608.0), tl.constexpr(0x4B000000)
_ROUND_IN_FOURS = tl.constexpr(0x4B400000 + 0x40000000 - 2**32)  # what it adds to a word of four codes


@triton.jit
def is_finite(x):
    """Whether each float32 is neither infinite nor NaN."""
    return tl.abs(x) <= _FP32_MAX


@triton.jit
def quantize_groups(
    x, MODE: tl.constexpr, CENTER: tl.constexpr, SPAN: tl.constexpr, ASYM_MAX_CODE: tl.constexpr
):  # fmt: skip
    """Groups float32 [X, G, g] to codes in fours, int32 [X, G, g / 4], scales and zeros float16 [X, G].

    Four codes in a row are the bytes of a word, the first one lowest. Zeros have no meaning where the mode has none.
    A group with a number that is not finite gets the scale NaN, codes and zero 0.
    """
    # Magnitudes compare as their bits do, with infinity and every NaN on top of what is finite.
    largest = _tree_max(tl.abs(x).to(tl.int32, bitcast=True))
    finite = largest < _INFINITY_BITS
    x = tl.where(tl.expand_dims(finite, 2), x, 0.0)
    magnitude = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    if MODE == 0:
        levels, scales = _quantize_symmetric(x, magnitude, CENTER, SPAN)
        zeros = scales
        codes = _in_fours(levels)
    else:
        low, high = -_tree_max(-x), _tree_max(x)
        if MODE == 1:
            levels, scales, zeros = _quantize_asymmetric(x, low, high, ASYM_MAX_CODE)
            codes = _in_fours(levels)
        else:
            levels, sym_scales = _quantize_symmetric(x, magnitude, CENTER, SPAN)
            codes = _in_fours(levels)
            sym_error = _tree_sum(tl.abs(tl.fma(-_per_group(sym_scales), levels - _ROUND - CENTER, x)))
            levels, scales, zeros = _quantize_asymmetric(x, low, high, ASYM_MAX_CODE)
            decoded = tl.fma(_per_group(scales), levels - _ROUND, _per_group(zeros))
            symmetric = sym_error < _tree_sum(tl.abs(x - decoded))
            codes = tl.where(tl.expand_dims(symmetric, 2), codes, _in_fours(levels))
            negated = (scales.to(tl.int16, bitcast=True) | -32768).to(tl.float16, bitcast=True)
            scales = tl.where(symmetric, sym_scales, negated)
            zeros = tl.where(symmetric, 0.0, zeros)
    codes = tl.where(tl.expand_dims(finite, 2), codes, 0)
    return codes, tl.where(finite, scales, float("nan")), tl.where(finite, zeros, 0.0)


@triton.jit
def dequantize_groups(codes, scales, zeros, MODE: tl.constexpr, CENTER: tl.constexpr):
    """``x = s * (u - c0) + z``: codes in fours, int32 [X, G, g / 4], scales and zeros [X, G] to float32 [X, G, g]."""
    u = _from_fours(codes)
    if MODE == 0:
        x = _per_group(scales) * (u - CENTER)
    elif MODE == 1:
        x = _per_group(scales) * u + _per_group(zeros)
    else:
        # The sign bit marks an asymmetric group, also on a scale of -0.0.
        center = tl.where(scales.to(tl.int16, bitcast=True) < 0, 0.0, CENTER)
        x = tl.abs(_per_group(scales)) * (u - tl.expand_dims(center, 2)) + _per_group(zeros)
    return x


@triton.jit
def load_zeros(zeros_ptrs, scales, MODE: tl.constexpr):
    """The zeros [X, G] beside the scales; where the mode stores none, the scales stand in for them."""
    zeros = scales
    if MODE != 0:
        zeros = tl.load(zeros_ptrs)
    return zeros


@triton.jit
def _quantize_symmetric(x, magnitude, CENTER: tl.constexpr, SPAN: tl.constexpr):
    scales = _to_fp16(divide_by_integer(magnitude, SPAN))
    # The largest code is twice the center, and rounding a sum keeps order: clamping first does the same, in one
    # instruction where both ends have the same magnitude.
    return tl.clamp(divide_by_scales(x, _per_group(scales)), -CENTER, CENTER) + CENTER + _ROUND, scales


@triton.jit
def _quantize_asymmetric(x, low, high, MAX_CODE: tl.constexpr):
    zeros = _to_fp16(low)
    scales = _to_fp16(divide_by_integer(tl.minimum(high - low, _FP32_MAX), MAX_CODE * 1.0))
    u = divide_by_scales(x - _per_group(zeros), _per_group(scales))
    return tl.minimum(tl.maximum(u, 0.0), MAX_CODE * 1.0) + _ROUND, scales, zeros


@triton.jit
def _per_group(x):
    """float16 [X, G] as float32 [X, G, 1]."""
    return tl.expand_dims(x.to(tl.float32), 2)


@triton.jit
def _to_fp16(x):
    return tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX).to(tl.float16)


@triton.jit
def _in_fours(levels):
    """Codes that :data:`_ROUND` was added to, float32 [X, G, g], as words of four, int32 [X, G, g / 4]."""
    X: tl.constexpr = levels.shape[0]
    G: tl.constexpr = levels.shape[1]
    bits = tl.reshape(levels.to(tl.int32, bitcast=True), [X, G, levels.shape[2] // 4, 4])
    halves = tl.reshape(bits << (8 * tl.arange(0, 4)[None, None, None, :]), [X, G, levels.shape[2] // 4, 2, 2])
    return tl.sum(tl.sum(halves, 4), 3) - _ROUND_IN_FOURS  # by halving, as in _tree_max


@triton.jit
def _from_fours(codes):
    """Bytes of words, int32 [X, G, n], as float32 [X, G, 4 * n], by OR-ing them into the last bits of ``2**23``."""
    X: tl.constexpr = codes.shape[0]
    G: tl.constexpr = codes.shape[1]
    N: tl.constexpr = codes.shape[2]
    place = 8 * tl.arange(0, 4)[None, None, None, :]
    bits = (tl.reshape(codes, [X, G, N, 1]) >> place) & 0xFF | _TWO_23_BITS
    return tl.reshape(bits.to(tl.float32, bitcast=True) - _TWO_23, [X, G, 4 * N])


@triton.jit
def _tree_max(x):
    """Largest of the last axis (a power of two), by halving.

    Where the lanes that share a group are not neighbours, as in the layouts that codes are packed from, Triton 3.6
    shuffles between the wrong ones if it reduces the whole axis at once.
    """
    LENGTH: tl.constexpr = x.shape[2]
    if LENGTH == 1:
        largest = tl.reshape(x, [x.shape[0], x.shape[1]])
    elif LENGTH > 32:
        low, high = _halves(x)
        largest = _tree_max(tl.maximum(low, high))
    else:
        largest = _tree_max(tl.max(tl.reshape(x, [x.shape[0], x.shape[1], 2, LENGTH // 2]), 2))
    return largest


@triton.jit
def _tree_sum(x):
    """Sum over the last axis (a power of two) by halving, so that no reduction order of the compiler matters."""
    LENGTH: tl.constexpr = x.shape[2]
    if LENGTH == 1:
        total = tl.reshape(x, [x.shape[0], x.shape[1]])
    elif LENGTH > 32:
        low, high = _halves(x)
        total = _tree_sum(low + high)
    else:
        total = _tree_sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, LENGTH // 2]), 2))
    return total


@triton.jit
def _halves(x):
    """[X, G, L] in two; for long groups, which several warps share: Triton 3.6 reduces over those wrongly too."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), [0, 1, 3, 2]))
