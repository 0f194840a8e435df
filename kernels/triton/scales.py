"""Scales of packed blocks for decode_attention: steps and constants in operand order, all of a block with one load."""

from __future__ import annotations

import triton
import triton.language as tl

from innerq_compile.kernels.triton.operands import place


@triton.jit
def load_key_scales(
    scales_ptr, zeros_ptr, block,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Steps and constants of blocks ``block`` int64 [NB]: a tuple of [NB, 32 tokens] for each group of channels."""
    BLOCK_SCALES: tl.constexpr = HEAD_DIM * 32 // GROUP
    offsets = (block * BLOCK_SCALES)[:, None]
    return _load_scales(scales_ptr + offsets, zeros_ptr + offsets, HEAD_DIM // GROUP, MODE, CENTER, NB)


@triton.jit
def load_value_scales(
    scales_ptr, zeros_ptr, block, part: tl.constexpr,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Steps and constants of a part of blocks ``block`` int64 [NB]: a tuple of [NB, 32 channels] for each tile."""
    if GROUP <= 32:
        offsets = (block * (32 // GROUP * HEAD_DIM) + part * HEAD_DIM)[:, None]
    else:
        offsets = (block // (GROUP // 32) * HEAD_DIM)[:, None]
    return _load_scales(scales_ptr + offsets, zeros_ptr + offsets, HEAD_DIM // 32, MODE, CENTER, NB)


@triton.jit
def _load_scales(
    first_scales, first_zeros, COUNT: tl.constexpr, MODE: tl.constexpr, CENTER: tl.constexpr, NB: tl.constexpr
):
    """Step s and constant z of ``s * u + z``: tuples of COUNT float32 [NB, 32] in operand order, from COUNT * 32 scales
    in a row behind each pointer [NB, 1]. The constants have no meaning in symmetric mode.
    """
    scales = _load_rows(first_scales, COUNT, NB)
    zeros = scales
    if MODE != 0:
        zeros = _load_rows(first_zeros, COUNT, NB)
    steps, constants = (), ()
    for k in tl.static_range(COUNT):
        s = scales[k].to(tl.float32)
        z = zeros[k].to(tl.float32)
        if MODE == 2:
            # The sign bit marks an asymmetric group, also on a scale of -0.0.
            z -= tl.abs(s) * tl.where(s.to(tl.int32, bitcast=True) < 0, 0.0, CENTER)
            s = tl.abs(s)
        steps += (s,)
        constants += (z,)
    return steps, constants


@triton.jit
def _load_rows(first, COUNT: tl.constexpr, NB: tl.constexpr):
    """A tuple of COUNT [NB, 32] in operand order."""
    rows = ()
    if COUNT & (COUNT - 1) == 0:
        # All with one wide load.
        x = tl.load(first + tl.arange(0, COUNT * 32)[None, :])
        x = tl.permute(tl.reshape(x, [NB, COUNT, 2, 8, 2]), [0, 2, 4, 3, 1])
        rows = _split_rows(tl.reshape(x, [NB, 32, COUNT]), COUNT, NB)
    else:
        for k in tl.static_range(COUNT):
            rows += (tl.load(first + (k * 32 + place(tl.arange(0, 32)))[None, :]),)
    return rows


@triton.jit
def _split_rows(x, COUNT: tl.constexpr, NB: tl.constexpr):
    """[NB, 32, COUNT] to a tuple of COUNT [NB, 32]."""
    if COUNT == 1:
        rows = (tl.reshape(x, [NB, 32]),)
    else:
        x = tl.permute(tl.reshape(x, [NB, 32, 2, COUNT // 2]), [0, 1, 3, 2])
        low, high = tl.split(x)
        rows = _split_rows(low, COUNT // 2, NB) + _split_rows(high, COUNT // 2, NB)
    return rows
