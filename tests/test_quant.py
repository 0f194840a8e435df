"""Exact tests of the quantizer: hand-derived rounding, degenerate groups, packing."""

import math

import pytest
import torch

from innerq_compile.numerics.config import BITS, LEVELS, MODES, InnerQConfig, TensorQuantSpec
from innerq_compile.numerics.layout import PLANES
from innerq_compile.numerics.quant import (
    FP16_MAX,
    KEY_CENTER_MIN_TOKENS,
    KEY_NORM_EPS,
    dequantize_groups,
    key_center_and_norm,
    pack_tiles,
    quantize_groups,
    unpack_tiles,
)


def spec_of(bits, mode="symmetric", levels="full"):
    return TensorQuantSpec(bits, mode, levels, 32)


def round_trip(x, spec):
    return dequantize_groups(*quantize_groups(x, spec), spec)


# Each case: numbers whose largest magnitude makes the step exactly 1 or 1/2, the codes, and what they decode to.
# "full" 3 bits: s = 4/4 = 1, u = x + 3.5 half to even, decoded u - 3.5:
#   4 -> 7.5 -> 7 (clamped), -4 -> -0.5 -> 0, 0 -> 3.5 -> 4, 1 -> 4.5 -> 4, -1 -> 2.5 -> 2, 2 -> 5.5 -> 6
# "paper" 3 bits: s = 3/3 = 1, u = x + 3: 0.5 -> 3.5 -> 4, 1.5 -> 4.5 -> 4, -0.5 -> 2.5 -> 2, 2.5 -> 5.5 -> 6
# "full" 2 bits: s = 4/2 = 2, u = x/2 + 1.5: 4 -> 3.5 -> 3, 1 -> 2, 2 -> 2.5 -> 2, 0 -> 1.5 -> 2, -2 -> 0.5 -> 0
# "paper" 2 bits is ternary: s = 4, u = x/4 + 1: 2 -> 1.5 -> 2, -2 -> 0.5 -> 0, 1 -> 1.25 -> 1
# asymmetric 2 bits: z = -1, s = (2+1)/3 = 1, u = x + 1: -0.5 -> 0.5 -> 0, 0.5 -> 1.5 -> 2, 1.5 -> 2.5 -> 2
ROUNDING = [
    (spec_of(3), [4, -4, 0, 1, -1, 2, 0.5], [7, 0, 4, 4, 2, 6, 4], [3.5, -3.5, 0.5, 0.5, -1.5, 2.5, 0.5]),
    (spec_of(3, levels="paper"), [3, -3, 0.5, 1.5, -0.5, 2.5, 0], [6, 0, 4, 4, 2, 6, 3], [3, -3, 1, 1, -1, 3, 0]),
    (spec_of(2), [4, 1, 2, 0, -2, -4], [3, 2, 2, 2, 0, 0], [3, 1, 1, 1, -3, -3]),
    (spec_of(2, levels="paper"), [4, 2, -2, 1, -4], [2, 2, 0, 1, 0], [4, 4, -4, 0, -4]),
    (spec_of(2, "asymmetric"), [-1, 2, -0.5, 0.5, 1.5, 0], [0, 3, 0, 2, 2, 1], [-1, 2, -1, 1, 1, 0]),
    (spec_of(8), [128, -128, 0, 1, -1, 0.25], [255, 0, 128, 128, 126, 128], [127.5, -127.5, 0.5, 0.5, -1.5, 0.5]),
]


@pytest.mark.parametrize(("spec", "x", "codes", "decoded"), ROUNDING)
def test_rounding_cases_derived_by_hand(spec, x, codes, decoded):
    x = torch.tensor(x + [0.0] * (32 - len(x)))
    result = quantize_groups(x, spec)
    assert result.codes[: len(codes)].tolist() == codes
    assert dequantize_groups(*result, spec)[: len(decoded)].tolist() == decoded


def test_hybrid_takes_the_offset_where_it_helps_and_marks_it_in_the_sign():
    spec = spec_of(2, "hybrid")
    shifted = torch.tensor([10.0, 11.0] * 16)  # asymmetric: z = 10, s = 1/3, exact up to the rounding of s
    centred = torch.tensor([3.0, -3.0, 1.0, -1.0] * 7 + [4.0, 3.0, -1.0, 1.0])  # symmetric: s = 2, one error of 1
    codes, scales, zeros = quantize_groups(torch.stack([shifted, centred]), spec)
    assert torch.signbit(scales).tolist() == [True, False]
    assert zeros.tolist() == [10.0, 0.0]
    assert codes[0].tolist() == [0, 3] * 16
    assert round_trip(centred, spec).tolist() == centred.clamp(max=3.0).tolist()


def test_the_published_hybrid_gives_its_asymmetric_arm_one_bit_less():
    codes, scales, _ = quantize_groups(torch.linspace(10, 11, 32), spec_of(3, "hybrid", "paper"))
    assert torch.signbit(scales) and int(codes.max()) == 3
    codes, scales, _ = quantize_groups(torch.linspace(10, 11, 32), spec_of(3, "hybrid", "full"))
    assert torch.signbit(scales) and int(codes.max()) == 7


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
class TestDegenerateGroups:
    def test_zero_group_is_exactly_zero(self, bits, mode, levels):
        assert round_trip(torch.zeros(4, 32), spec_of(bits, mode, levels)).eq(0).all()

    def test_numbers_too_small_for_a_fp16_scale_decode_to_the_constant(self, bits, mode, levels):
        x = torch.full((32,), 1e-12)
        assert round_trip(x, spec_of(bits, mode, levels)).eq(0).all()

    def test_constant_group_is_within_half_a_step(self, bits, mode, levels):
        spec = spec_of(bits, mode, levels)
        x = torch.full((32,), 3.0)
        error = (round_trip(x, spec) - x).abs().max().item()
        # The symmetric step is max/span; the outer level lies half a step inside (full) or on the maximum (paper).
        step = 3.0 / spec.symmetric_span if mode == "symmetric" and levels == "full" else 0.0
        fp16_rounding = 3.0 * 2**-10
        assert error <= step / 2 + fp16_rounding

    def test_huge_numbers_saturate_and_stay_finite(self, bits, mode, levels):
        x = torch.tensor([3e38, -3e38] + [1.0] * 30)
        result = quantize_groups(x, spec_of(bits, mode, levels))
        assert result.scales.abs().max() <= FP16_MAX
        assert torch.isfinite(round_trip(x, spec_of(bits, mode, levels))).all()

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_makes_nan_of_its_group_and_of_no_other(self, bits, mode, levels, poison):
        spec = spec_of(bits, mode, levels)
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
        clean = quantize_groups(x, spec)
        x[1, 5] = poison
        codes, scales, zeros = quantize_groups(x, spec)
        assert scales.view(torch.int16)[1] == 0x7E00 and not codes[1].any()
        assert zeros is None or zeros[1] == 0
        assert round_trip(x, spec)[1].isnan().all()
        assert torch.equal(codes[::2], clean.codes[::2]) and torch.equal(scales[::2], clean.scales[::2])

    def test_error_is_at_most_half_a_step(self, bits, mode, levels):
        spec = spec_of(bits, mode, levels)
        x = torch.randn(500, 32, generator=torch.Generator().manual_seed(2))
        codes, scales, _ = result = quantize_groups(x, spec)
        error = (dequantize_groups(*result, spec) - x).abs()
        step = scales.float().abs().unsqueeze(-1)
        # The stored step may be 2^-11 smaller than the exact one, over at most 2^bits levels; zeros round likewise.
        slack = step * 2.0 ** (bits - 10) + x.abs().amax(-1, keepdim=True) * 2.0**-10
        assert (error <= step / 2 + slack).all(), (error - step / 2).max()


# N(0,1), g = 32 (docs/design.md section 3). 40000 groups: the mean of 1.28 M squared errors is known to about 0.3 %.
@pytest.mark.parametrize(
    ("bits", "levels", "mse"), [(3, "paper", 0.0513), (3, "full", 0.0316), (2, "paper", 0.433), (2, "full", 0.126)]
)
def test_mean_squared_error_on_gaussian_groups(bits, levels, mse):
    x = torch.randn(40000, 32, generator=torch.Generator().manual_seed(3))
    squared = (round_trip(x, spec_of(bits, levels=levels)) - x).square().mean(-1)
    standard_error = (squared.std() / len(x) ** 0.5).item()
    last_digit = 0.5 * 10.0 ** -(3 if bits == 2 else 4)
    assert abs(squared.mean().item() - mse) <= 4 * standard_error + last_digit


def test_scales_and_codes_agree_with_the_stored_fp16_scale():
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(4))
    codes, scales, _ = quantize_groups(x, spec_of(4))
    assert scales.dtype == torch.float16 and codes.dtype == torch.uint8
    expected = (x / scales.float().unsqueeze(-1) + 7.5).clamp(0, 15).round()
    assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_packing_round_trips_every_code(bits):
    codes = torch.randint(0, 2**bits, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    packed = pack_tiles(codes, bits)
    assert packed.shape == (5, 3, 128 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack_tiles(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packed_bytes_follow_the_map_in_layout(bits):
    codes = torch.randint(0, 2**bits, (32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    packed = pack_tiles(codes, bits)
    offset, shift = 0, 0
    for width in PLANES[bits]:
        num_fields = 8 // width
        fo = min(num_fields, 2)
        fi = num_fields // fo
        for outer in range(32):
            for inner in range(32):
                half, quad = outer // 16, inner // 4
                field = (quad // (8 // fi)) * fo + (half if fo == 2 else 0)
                row = (quad % (8 // fi)) * (2 // fo) + (half if fo == 1 else 0)
                byte = (row * 16 + outer % 16) * 4 + inner % 4
                got = (int(packed[offset + byte]) >> (width * field)) & (2**width - 1)
                assert got == (int(codes[outer, inner]) >> shift) & (2**width - 1)
        offset, shift = offset + 128 * width, shift + width


class TestKeyCenterAndNorm:
    def center_and_norm(self, keys, **settings):
        """Of keys [T, D] whose last token is not valid, as two lists."""
        valid = (torch.arange(len(keys)) < len(keys) - 1)[None]
        config = InnerQConfig.from_preset("paper-base", **settings)
        center, norm = key_center_and_norm(keys[None, None], valid, config)
        assert center.shape == norm.shape == (1, 1, keys.shape[1])
        return center[0, 0].tolist(), norm[0, 0].tolist()

    @pytest.fixture
    def keys(self):
        # Extremes of the four channels, without what must not count: -4 .. 2, 0 .. 9, none, 1 .. 1.
        keys = torch.tensor([[1.0, 9.0, math.nan, 1.0], [-4.0, math.inf, math.nan, 1.0], [2.0, 0.0, math.inf, 1.0]])
        return torch.cat([keys.repeat(KEY_CENTER_MIN_TOKENS // 3 + 1, 1), torch.full((1, 4), -50.0)])

    def test_the_norm_is_a_power_of_the_largest_magnitude_of_valid_finite_tokens(self, keys):
        assert self.center_and_norm(keys) == ([0.0] * 4, [2.0, 3.0, KEY_NORM_EPS, 1.0])
        assert self.center_and_norm(keys, key_norm_exponent=1.0)[1] == [4.0, 9.0, KEY_NORM_EPS, 1.0]

    def test_partners_share_the_larger_norm(self, keys):
        one = {"key_norm_exponent": 1.0}
        assert self.center_and_norm(keys, **one, rope_pairs="half")[1] == [4.0, 9.0, 4.0, 9.0]
        assert self.center_and_norm(keys, **one, rope_pairs="adjacent")[1] == [9.0, 9.0, 1.0, 1.0]

    @pytest.mark.parametrize(("key_norm", "norms"), [("runtime", [2.0, 3.0, KEY_NORM_EPS, 1.0]), ("off", [1.0] * 4)])
    def test_the_center_is_the_middle_of_the_range_and_leaves_the_norm_alone(self, keys, key_norm, norms):
        found = self.center_and_norm(keys, key_center="runtime", key_norm=key_norm)
        assert found == ([-1.0, 4.5, 0.0, 1.0], norms)

    def test_too_few_tokens_fix_no_center(self, keys):
        few = keys[-KEY_CENTER_MIN_TOKENS:]
        assert self.center_and_norm(few, key_center="runtime")[0] == [0.0] * 4
        assert self.center_and_norm(keys[-KEY_CENTER_MIN_TOKENS - 1 :], key_center="runtime")[0][0] == -1.0

    def test_numbers_near_the_largest_float_do_not_overflow(self):
        keys = torch.tensor([[3e38], [2e38], [0.0]]).repeat(1, 2)
        center, norm = self.center_and_norm(keys.repeat_interleave(512, 0), key_center="runtime", key_norm_exponent=1.0)
        assert all(map(math.isfinite, center + norm))

    def test_the_order_of_the_tokens_does_not_matter(self):
        keys = torch.randn(1, 2, 700, 32, generator=torch.Generator().manual_seed(0))
        valid = torch.ones(1, 700, dtype=torch.bool)
        config = InnerQConfig(key_center="runtime", key_norm_exponent=1.0, rope_pairs="half")
        shuffled = keys[:, :, torch.randperm(700, generator=torch.Generator().manual_seed(1))]
        for a, b in zip(*(key_center_and_norm(k, valid, config) for k in (keys, shuffled)), strict=True):
            assert torch.equal(a, b)
