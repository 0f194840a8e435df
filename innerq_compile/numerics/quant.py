"""The quantizer: groups to codes, scales and zeros, and codes to bytes. The one place to change a rounding.

Everything is float32 and elementwise IEEE (no fused multiply-add), or a reduction whose order is fixed or does not
matter, so that a kernel can reproduce every code and every scale bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from innerq_compile.numerics.config import BLOCK, InnerQConfig, TensorQuantSpec
from innerq_compile.numerics.layout import PLANES

FP16_MAX = 65504.0

KEY_NORM_EPS = 2.0**-10
"""Floor of a key norm: a channel that was silent in the first keys must not blow up the later ones."""

KEY_CENTER_MIN_TOKENS = 512
"""A center is fixed from at least this many tokens. From fewer it does more harm than good once the context has grown:
RoPE turns what looked like a constant of the channel."""


class QuantizedGroups(NamedTuple):
    """Codes uint8 [..., g], scales float16 [...], zeros float16 [...] or ``None`` where the mode stores none."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def quantize_groups(x: torch.Tensor, spec: TensorQuantSpec) -> QuantizedGroups:
    """Quantizes groups along the last axis.

    Args:
        x: [..., g], any float dtype.
        spec: Bits, mode and levels; ``g`` is taken from the shape.

    Returns:
        Codes against the *stored* (float16, saturated) scale and zero, rounded half to even.
        A group whose stored scale is zero dequantizes to its exact constant: 0, or its zero.
        A group with a number that is not finite has scale NaN (the float16 0x7e00), codes and zero 0: it dequantizes
        to NaN, so what attends to it is NaN and nobody takes a made-up number for a result.
    """
    x = x.float()
    finite = torch.isfinite(x).all(-1)
    x = torch.where(finite.unsqueeze(-1), x, 0.0)
    if spec.mode == "symmetric":
        groups = _quantize_symmetric(x, spec)
    elif spec.mode == "asymmetric":
        groups = _quantize_asymmetric(x, spec)
    else:
        groups = _pick_better(x, _quantize_symmetric(x, spec), _quantize_asymmetric(x, spec), spec)
    return QuantizedGroups(
        codes=torch.where(finite.unsqueeze(-1), groups.codes, 0),
        scales=torch.where(finite, groups.scales, math.nan),
        zeros=None if groups.zeros is None else torch.where(finite, groups.zeros, 0.0),
    )


def dequantize_groups(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, spec: TensorQuantSpec
) -> torch.Tensor:
    """Numbers ``x = s * (u - c0) + z`` (docs/design.md section 3): float32 [..., g].

    Args:
        codes: [..., g]
        scales, zeros: [...]
        spec: Bits, mode and levels.
    """
    u = codes.float()
    s = scales.float().unsqueeze(-1)
    if spec.mode == "symmetric":
        return s * (u - spec.symmetric_center)
    assert zeros is not None
    z = zeros.float().unsqueeze(-1)
    if spec.mode == "asymmetric":
        return s * u + z
    center = torch.where(torch.signbit(s), 0.0, spec.symmetric_center)
    return s.abs() * (u - center) + z


def _quantize_symmetric(x: torch.Tensor, spec: TensorQuantSpec) -> QuantizedGroups:
    scales = _to_fp16(x.abs().amax(-1) / spec.symmetric_span)
    codes = _round_to_codes(_safe_divide(x, scales) + spec.symmetric_center, spec.symmetric_max_code)
    return QuantizedGroups(codes, scales, None)


def _quantize_asymmetric(x: torch.Tensor, spec: TensorQuantSpec) -> QuantizedGroups:
    low, high = x.amin(-1), x.amax(-1)
    zeros = _to_fp16(low)
    scales = _to_fp16((high - low) / spec.asymmetric_max_code)
    codes = _round_to_codes(_safe_divide(x - zeros.float().unsqueeze(-1), scales), spec.asymmetric_max_code)
    return QuantizedGroups(codes, scales, zeros)


def _pick_better(
    x: torch.Tensor, symmetric: QuantizedGroups, asymmetric: QuantizedGroups, spec: TensorQuantSpec
) -> QuantizedGroups:
    """Per group the arm with the smaller summed absolute error; a tie goes asymmetric, as published.

    The choice is written into the sign bit of the scale: set means asymmetric (also for a scale of -0.0).
    """
    assert asymmetric.zeros is not None
    zeros = asymmetric.zeros
    s_sym, s_asym = symmetric.scales.float().unsqueeze(-1), asymmetric.scales.float().unsqueeze(-1)
    x_sym = s_sym * (symmetric.codes.float() - spec.symmetric_center)
    x_asym = s_asym * asymmetric.codes.float() + zeros.float().unsqueeze(-1)
    use_symmetric = _tree_sum((x - x_sym).abs()) < _tree_sum((x - x_asym).abs())
    return QuantizedGroups(
        codes=torch.where(use_symmetric.unsqueeze(-1), symmetric.codes, asymmetric.codes),
        scales=torch.where(use_symmetric, symmetric.scales, -asymmetric.scales),
        zeros=torch.where(use_symmetric, torch.zeros_like(zeros), zeros),
    )


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis (a power of two) by halving: a fixed order that vector code and Triton can follow."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _to_fp16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP16_MAX, FP16_MAX).half()


def _safe_divide(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x / s, and 0 for every member of a group whose stored scale is zero."""
    s = scales.float().unsqueeze(-1)
    return torch.where(s > 0, x / torch.where(s > 0, s, 1.0), 0.0)


def _round_to_codes(u: torch.Tensor, max_code: int) -> torch.Tensor:
    return u.clamp(0, max_code).round().to(torch.uint8)


def key_center_and_norm(
    keys: torch.Tensor, valid: torch.Tensor, config: InnerQConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per channel the center c and the norm n with which a row's keys are quantized from then on, as ``(k - c) / n``.

    Both follow from the smallest (lo) and the largest (hi) key of the channel, so the order of the tokens cannot
    matter::

        c = 0.5 * lo + 0.5 * hi                        # key_center "runtime" and enough tokens, else 0
        a = max(hi, -lo)                               # max |k|
        n = max(a, a of the channel's RoPE partner) ** key_norm_exponent        # key_norm "runtime", else 1

    The published norm (InnerQ section 4) is exponent 0.5 without center and partner. ``n`` looks at ``|k|`` and not at
    ``|k - c|``, and asks the partner, because a slow RoPE channel looks constant until it has turned: a norm of what
    it did meanwhile would be far too small (``benchmarks/bench_key_norm.py``, short prompts).

    Args:
        keys: [B, H, T, D] post-RoPE keys.
        valid: bool [B, T], tokens that count. Numbers that are not finite never count. A channel where nothing counts
            has lo = hi = 0.

    Returns:
        Two float32 [B, H, D]: centers, and norms floored at :data:`KEY_NORM_EPS`.
    """
    keys = keys.float()
    counted = valid[:, None, :, None] & torch.isfinite(keys)
    any_counted = counted.any(2)
    low = torch.where(any_counted, torch.where(counted, keys, math.inf).amin(2), 0.0)
    high = torch.where(any_counted, torch.where(counted, keys, -math.inf).amax(2), 0.0)
    center = torch.zeros_like(low)
    if config.key_center == "runtime":
        enough = valid.sum(1) >= KEY_CENTER_MIN_TOKENS
        center = torch.where(enough[:, None, None], 0.5 * low + 0.5 * high, center)
    norm = torch.ones_like(low)
    if config.key_norm == "runtime":
        norm = torch.maximum(high, -low)
        if config.rope_pairs != "off":
            norm = torch.maximum(norm, _rope_partner(norm, config.rope_pairs))
        if config.key_norm_exponent == 0.5:
            # torch's float32 root on the CPU is off by one ulp in 0.7 % of cases; through float64 it is IEEE.
            norm = norm.double().sqrt().float()
        norm = norm.clamp(min=KEY_NORM_EPS)
    return center, norm


def _rope_partner(x: torch.Tensor, pairs: str) -> torch.Tensor:
    """x [..., D] of the channel that RoPE mixes with each one: ``d +- D / 2``, or the neighbour in ``(2i, 2i + 1)``."""
    if pairs == "half":
        return x.roll(x.shape[-1] // 2, -1)
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def pack_tiles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs uint8 codes [..., 32 outer, 32 inner] into bytes [..., 128 * bits]; the map stands in ``layout``."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        fields = _to_fields((codes >> shift) & (2**width - 1), width)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((fields << shifts).sum(-1, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, -1)


def unpack_tiles(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack_tiles`: bytes [..., 128 * bits] to uint8 codes [..., 32 outer, 32 inner]."""
    codes = torch.zeros((*packed.shape[:-1], BLOCK, BLOCK), dtype=torch.uint8, device=packed.device)
    offset, shift = 0, 0
    for width in PLANES[bits]:
        size = BLOCK * BLOCK * width // 8
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        fields = (packed[..., offset : offset + size].unsqueeze(-1) >> shifts) & (2**width - 1)
        codes |= _from_fields(fields, width) << shift
        offset, shift = offset + size, shift + width
    return codes


def _field_split(width: int) -> tuple[int, int]:
    outer = min(8 // width, 2)
    return outer, 8 // width // outer


def _to_fields(codes: torch.Tensor, width: int) -> torch.Tensor:
    """[..., 32, 32] to [..., bytes, fields of a byte] of a plane of this width."""
    lead = codes.shape[:-2]
    fo, fi = _field_split(width)
    # outer = (half: field part, half: byte part, 16); inner = (part: field, quad: byte, 4)
    split = codes.reshape(*lead, fo, 2 // fo, 16, fi, 8 // fi, 4)
    order = (4, 1, 2, 5, 3, 0)  # bytes: quad, half, outer % 16, inner % 4; fields: inner part, half
    return split.permute(*range(len(lead)), *(len(lead) + i for i in order)).reshape(*lead, -1, fo * fi)


def _from_fields(fields: torch.Tensor, width: int) -> torch.Tensor:
    lead = fields.shape[:-2]
    fo, fi = _field_split(width)
    split = fields.reshape(*lead, 8 // fi, 2 // fo, 16, 4, fi, fo)
    order = (5, 1, 2, 4, 0, 3)
    return split.permute(*range(len(lead)), *(len(lead) + i for i in order)).reshape(*lead, BLOCK, BLOCK)
