"""Quotients from shared reciprocals, and the codes made with them, against IEEE division: bit for bit.

In blocks of whole arrays: on a GPU, or in Triton's interpreter, where a program of many numbers is numpy.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from innerq_compile.numerics.config import BITS, LEVELS, MODES, TensorQuantSpec
from innerq_compile.numerics.quant import KEY_NORM_EPS, quantize_groups

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from innerq_compile.kernels.triton import division, groups, interpreter  # noqa: E402
from innerq_compile.kernels.triton.launch import quant_constants  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreter.repair()
FLOAT_MAX = torch.finfo(torch.float32).max
SCALES = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
"""Every scale that can be stored, 0 included."""


def ulps_away(x, steps):
    """The floats ``steps`` places beside x > 0."""
    return (x.view(torch.int32) + steps).view(torch.float32)


def floats(count, low, high, seed):
    """Numbers with any mantissa and sign, their exponents evenly in [low, high)."""
    random = torch.Generator().manual_seed(seed)
    exponents = torch.randint(low + 127, high + 127, (count,), generator=random)
    bits = torch.randint(0, 2**23, (count,), generator=random) | exponents << 23
    sign = torch.randint(0, 2, (count,), generator=random) * 2 - 1
    return bits.int().view(torch.float32) * sign


def near_midpoints(divisors, seed):
    """For each divisor a number whose quotient lies as near as can be to the middle between two floats."""
    quotients = floats(len(divisors), -20, 20, seed).abs()
    middle = (quotients.double() + ulps_away(quotients, 1).double()) / 2
    random = torch.Generator().manual_seed(seed)
    product = (middle * divisors.double()).clamp(max=FLOAT_MAX / 2, min=2.0**-80).float()
    return ulps_away(product, torch.randint(-1, 2, product.shape, generator=random, dtype=torch.int32))


@triton.jit
def divide_kernel(x_ptr, center_ptr, divisor_ptr, out_ptr, n, WHAT: tl.constexpr, INTEGER: tl.constexpr):
    places = tl.program_id(0) * 65536 + tl.arange(0, 65536)
    x = tl.load(x_ptr + places, mask=places < n, other=1.0)
    center = tl.load(center_ptr + places, mask=places < n, other=0.0)
    divisor = tl.load(divisor_ptr + places, mask=places < n, other=1.0)
    if WHAT == "norm":
        out = division.normalize(x, center, divisor)
    elif WHAT == "scale":
        out = division.divide_by_scales(x, divisor)
    else:
        out = division.divide_by_integer(x, INTEGER)
    tl.store(out_ptr + places, out, mask=places < n)


def divide(x, divisor, what, center=None, integer=1.0):
    x, divisor = torch.broadcast_tensors(x, divisor)
    x, divisor, center = (
        t.contiguous().to(DEVICE) for t in (x, divisor, torch.zeros_like(x) if center is None else center)
    )
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 65536),)
    divide_kernel[grid](x, center, divisor, out, x.numel(), WHAT=what, INTEGER=integer, enable_fp_fusion=False)
    return out.cpu()


def check(got, expected, tiny):
    """Same bits; below ``tiny`` only as tiny as it should be; what is not finite need only be not finite."""
    is_tiny = expected.abs() < tiny
    assert (got[is_tiny].abs() <= 2 * tiny).all()
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    rest = finite & ~is_tiny
    wrong = (got != expected) & rest
    assert not wrong.any(), f"{int(wrong.sum())} quotients differ, first {got[wrong][0]} and {expected[wrong][0]}"


def test_by_every_scale() -> None:
    scales = SCALES[1:]
    for seed in range(8):
        check(divide(near_midpoints(scales, seed), scales, "scale"), near_midpoints(scales, seed) / scales, 2.0**-60)
    # Rounding boundaries of codes: whole and half multiples of the scale, and the floats beside them.
    for multiple, steps in itertools.product((0.5, 1.0, 2.0, 2.5, 3.5, 63.0, 127.5), (-2, -1, 0, 1, 2)):
        x = -ulps_away(scales * multiple, steps)
        check(divide(x, scales, "scale"), x / scales, 2.0**-60)
    x = floats(len(scales), -126, 60, 0)
    check(divide(x, scales, "scale"), x / scales, 2.0**-60)
    x = floats(4096, -126, 128, 1)
    check(divide(x, SCALES[-1], "scale"), x / SCALES[-1], 2.0**-60)
    assert not divide(x, SCALES[0], "scale").any()


def norms(count, seed):
    return floats(count, -10, 128, seed).abs()


def test_by_any_norm() -> None:
    for seed in range(12):
        norm = norms(2**17, seed)
        key = near_midpoints(norm, seed)
        check(divide(key, norm, "norm"), key / norm, 2.0**-91)
        key, center = floats(2**17, -149 + 23, 128, seed), floats(2**17, -20, 128, seed + 100)
        check(divide(key, norm, "norm", center), (key - center) / norm, 2.0**-91)


def test_by_norms_with_extreme_mantissas() -> None:
    """Just below a power of two a reciprocal is furthest from its float; above it, nearest."""
    steps = torch.arange(-700, 700, dtype=torch.int32)
    for exponent in (-9, 0, 63, 64, 65, 127):
        norm = ulps_away(torch.tensor(2.0**exponent), steps)
        keys = ulps_away(torch.tensor(2.0 ** min(exponent, 100)), steps)
        check(divide(keys[:, None], norm, "norm"), keys[:, None] / norm, 2.0**-91)


def test_keys_at_the_end_of_the_range() -> None:
    """A quotient that just fits must not overflow on the way, one that does not must."""
    norm = norms(2**16, 0)
    for steps in range(-3, 4):
        fits = (norm.double() * FLOAT_MAX).clamp(max=FLOAT_MAX).float()
        key = ulps_away(fits, torch.full((), steps, dtype=torch.int32)).clamp(max=FLOAT_MAX)
        check(divide(key, norm, "norm"), key / norm, 2.0**-91)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, FLOAT_MAX, -FLOAT_MAX, 0.0, 2.0**-149, -(2.0**-130)])
    edges = torch.tensor([KEY_NORM_EPS, 1.0, 2.0**64, 3.0e38])
    check(divide(special[:, None], edges, "norm"), special[:, None] / edges, 2.0**-91)
    center = torch.full((8, 4), -3.0e38)
    check(divide(special[:, None], edges, "norm", center), (special[:, None] - center) / edges, 2.0**-91)


@pytest.mark.parametrize("divisor", sorted({
    value for bits, levels, mode in itertools.product(BITS, LEVELS, MODES)
    for spec in [TensorQuantSpec(bits, mode, levels, 32)] for value in (spec.symmetric_span, spec.asymmetric_max_code)
}))  # fmt: skip
def test_by_every_number_of_levels(divisor) -> None:
    divisors = torch.full((2**17,), float(divisor))
    for x in (near_midpoints(divisors, 0), floats(2**17, -20, 128, 1)):
        check(divide(x, divisors, "integer", integer=float(divisor)), x / divisors, 2.0**-30)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, X: tl.constexpr, g: tl.constexpr,
    K_BITS: tl.constexpr, K_MODE: tl.constexpr, K_CENTER: tl.constexpr, K_SPAN: tl.constexpr,
    K_ASYM_MAX_CODE: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, X)
    x = tl.load(x_ptr + group[:, None, None] * g + tl.arange(0, g)[None, None, :])
    codes, scales, zeros = groups.quantize_groups(x, K_MODE, K_CENTER, K_SPAN, K_ASYM_MAX_CODE)
    tl.store(codes_ptr + group[:, None, None] * (g // 4) + tl.arange(0, g // 4)[None, None, :], codes)
    tl.store(scales_ptr + group[:, None], scales)
    tl.store(zeros_ptr + group[:, None], zeros)


def hard_groups(spec, count, seed):
    """Groups whose members lie on, and one or two floats beside, the numbers where the code changes."""
    random = torch.Generator().manual_seed(seed)
    scales = SCALES[torch.randint(0, len(SCALES), (count, 1), generator=random)]
    steps = torch.randint(0, 2 * 2**spec.bits + 1, (count, 32), generator=random) - 2**spec.bits
    x = scales * steps / 2
    x = torch.where(x == 0, 0.0, x.sign() * ulps_away(x.abs(), torch.randint(-2, 3, x.shape, generator=random).int()))
    x[:, 0] = scales[:, 0] * spec.symmetric_span
    x[::7] += floats(len(x[::7]), -24, 16, seed)[:, None]  # away from zero
    x[::5] *= floats(32, -3, 3, seed)  # of unlike size
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, FLOAT_MAX, -FLOAT_MAX, 2.0**-149, -(2.0**-130), 65504.0])
    x[::3, 5], x[1::11] = special[torch.randint(0, 8, x[::3, 5].shape, generator=random)], 0.0
    x[2::9] = floats(x[2::9].numel(), -126, 128, seed).reshape(-1, 32)
    x[4::9] = floats(x[4::9].numel(), -26, -20, seed).reshape(-1, 32)  # where scales are subnormal
    return x[torch.randperm(count, generator=random)][:, torch.randperm(32, generator=random)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_hard_groups(bits, levels, mode) -> None:
    spec = TensorQuantSpec(bits, mode, levels, 32)
    x = hard_groups(spec, 4096, bits)
    codes = torch.empty(len(x), 32, dtype=torch.uint8, device=DEVICE)
    scales, zeros = (torch.empty(len(x), dtype=torch.float16, device=DEVICE) for _ in range(2))
    quantize_kernel[(1,)](
        x.to(DEVICE), codes.view(torch.int32), scales, zeros, X=len(x), g=32, **quant_constants("K", spec),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    expected = quantize_groups(x, spec)
    assert torch.equal(scales.cpu().view(torch.int16), expected.scales.view(torch.int16))
    if expected.zeros is not None:
        assert torch.equal(zeros.cpu(), expected.zeros)
    wrong = (codes.cpu() != expected.codes).nonzero()
    assert not len(wrong), f"{len(wrong)} codes differ, first in group {x[wrong[0, 0]].tolist()}"


def test_the_interpreters_fused_multiply_add_rounds_once() -> None:
    x, y = (floats(3000, -50, 50, seed).numpy() for seed in (0, 1))
    z = (-x.astype(np.float64) * y * (1 + floats(3000, -60, 0, 2).numpy().astype(np.float64))).astype(np.float32)
    assert np.isfinite(z).all()
    got = interpreter.fma_float32(x, y, z)
    for a, b, c, value in zip(x.tolist(), y.tolist(), z.tolist(), got, strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        off = abs(Fraction(float(value)) - exact)
        for beside in (np.nextafter(value, np.float32(np.inf)), np.nextafter(value, np.float32(-np.inf))):
            other = abs(Fraction(float(beside)) - exact)
            assert off < other or (off == other and value.view(np.int32) % 2 == 0)
