"""Launchers of the product kernels: shapes checked, programs counted."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_suite.product_fp16 import av_fp16_kernel, qk_fp16_kernel
from gpu_suite.product_layouts import Packed
from gpu_suite.product_matrices import av_matrices_kernel, qk_matrices_kernel
from gpu_suite.product_words import av_words_kernel, qk_words_kernel

Product = Callable[..., torch.Tensor]
"""``product(x, packed, steps, block)``: x float16 [heads, M, D] or [heads, M, tokens] to float32 [heads, M, ...]."""


def qk_words(x: torch.Tensor, packed: Packed, steps: int, block: int) -> torch.Tensor:
    """Scores of one query per head, in dot instructions on words."""
    heads, blocks, tiles, _ = packed.codes.shape
    out = torch.empty(heads, 1, 32 * blocks, dtype=torch.float32, device=x.device)
    _words(qk_words_kernel, x, packed, out, blocks // (block * steps), steps, block)
    return out


def av_words(x: torch.Tensor, packed: Packed, steps: int, block: int) -> torch.Tensor:
    """Values weighted by one row of probabilities per head, in dot instructions on words."""
    heads, blocks, tiles, _ = packed.codes.shape
    splits = blocks // (block * steps)
    out = torch.empty(heads, splits, 1, 32 * tiles, dtype=torch.float32, device=x.device)
    _words(av_words_kernel, x, packed, out, splits, steps, block)
    return out.sum(1)


def _words(kernel, x: torch.Tensor, packed: Packed, out: torch.Tensor, splits: int, steps: int, block: int) -> None:
    heads, blocks, tiles, _ = packed.codes.shape
    _check(splits * steps * block == blocks, f"{blocks} blocks in {splits} parts of {steps} x {block}")
    _check(x.shape[1] == 1 and x.is_contiguous(), f"one contiguous query per head, got {tuple(x.shape)}")
    kernel[(splits, heads)](
        x, packed.codes, packed.scales, packed.zeros, out, blocks, steps, TILES=tiles, BITS=packed.layout.bits,
        LAYOUT=packed.layout.kind, CENTER=packed.layout.center, ASM=x.is_cuda and torch.version.hip is None,
        STEP=block, num_warps=4,
    )  # fmt: skip


def qk_matrices(x: torch.Tensor, packed: Packed, steps: int, block: int, int8: bool) -> torch.Tensor:
    """Scores of up to 16 queries per head on tensor cores."""
    heads, blocks, _, _ = packed.codes.shape
    out = torch.empty(heads, x.shape[1], 32 * blocks, dtype=torch.float32, device=x.device)
    _matrices(qk_matrices_kernel, x, packed, out, blocks // (block * steps), steps, block, int8)
    return out


def av_matrices(x: torch.Tensor, packed: Packed, steps: int, block: int, int8: bool) -> torch.Tensor:
    """Values weighted by up to 16 rows of probabilities per head on tensor cores."""
    heads, blocks, tiles, _ = packed.codes.shape
    splits = blocks // (block * steps)
    out = torch.empty(heads, splits, x.shape[1], 32 * tiles, dtype=torch.float32, device=x.device)
    _matrices(av_matrices_kernel, x, packed, out, splits, steps, block, int8)
    return out.sum(1)


def _matrices(
    kernel, x: torch.Tensor, packed: Packed, out: torch.Tensor, splits: int, steps: int, block: int, int8: bool
) -> None:  # fmt: skip
    heads, blocks, tiles, _ = packed.codes.shape
    _check(splits * steps * block == blocks, f"{blocks} blocks in {splits} parts of {steps} x {block}")
    _check(x.shape[1] <= 16 and x.is_contiguous(), f"at most 16 contiguous queries per head, got {tuple(x.shape)}")
    kernel[(splits, heads)](
        x, packed.codes, packed.scales, packed.zeros, out, blocks, steps, QUERIES=x.shape[1], TILES=tiles,
        BITS=packed.layout.bits, LAYOUT=packed.layout.kind, CENTER=packed.layout.center, INT8=int8, P=block,
        num_warps=4,
    )  # fmt: skip


def qk_fp16(x: torch.Tensor, dense: torch.Tensor, steps: int, block: int) -> torch.Tensor:
    """Scores of one query per head over dense [heads, tokens, D]."""
    heads, tokens, head_dim = dense.shape
    out = torch.empty(heads, 1, tokens, dtype=torch.float32, device=x.device)
    _fp16(qk_fp16_kernel, x, dense, out, steps, block)
    return out


def av_fp16(x: torch.Tensor, dense: torch.Tensor, steps: int, block: int) -> torch.Tensor:
    """Dense values [heads, tokens, D] weighted by one row of probabilities per head."""
    heads, tokens, head_dim = dense.shape
    out = torch.empty(heads, tokens // (32 * block * steps), 1, head_dim, dtype=torch.float32, device=x.device)
    _fp16(av_fp16_kernel, x, dense, out, steps, block)
    return out.sum(1)


def _fp16(kernel, x: torch.Tensor, dense: torch.Tensor, out: torch.Tensor, steps: int, block: int) -> None:
    heads, tokens, head_dim = dense.shape
    splits = tokens // (32 * block * steps)
    _check(splits * steps * block * 32 == tokens, f"{tokens} tokens in {splits} parts of {steps} x {32 * block}")
    kernel[(splits, heads)](x, dense, out, tokens, steps, D=head_dim, BLOCK=32 * block, num_warps=4)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"the product kernels do not serve {message}")
