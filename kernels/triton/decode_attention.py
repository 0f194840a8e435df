"""decode_attention on CUDA and ROCm: checks, how the work is cut, and the two launches.

Every size here depends on shapes and settings alone, never on how many tokens a cache holds: nothing is read by the
host, and a captured graph serves a growing cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from innerq_compile import ops
from innerq_compile.kernels.triton.decode_attention_kernels import combine_kernel, decode_attention_kernel
from innerq_compile.kernels.triton.launch import Launch, code_constants, rows_contiguous, serves
from innerq_compile.numerics.arguments import check_decode_attention
from innerq_compile.numerics.config import BLOCK, InnerQConfig
from innerq_compile.numerics.layout import LayerState

CAUSAL, BOOLEAN, ADDITIVE = range(3)
"""Kinds of mask, as the kernel numbers them."""

BLOCKS_AT_ONCE = 4
"""Blocks that a program works on side by side: one per warp."""

PROGRAMS_PER_PROCESSOR = 2
"""With packed blocks. Registers and shared memory of a multiprocessor hold three of most kernels, so that what does not
divide evenly begins at once too, and two of the others (benchmarks/results/sass-*.json)."""

COMBINED_AT_ONCE = (16, 64)
"""Splits that a program of the merge reads at a time: the fewer, cheaper for many heads, where those are all."""

NUM_BUFFERS = len(LayerState._fields)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel now."""
    kernel[grid](*args, **options)


def decode_attention(query: torch.Tensor, *args: Any, launch: Launch = run) -> torch.Tensor:
    """See :func:`innerq_compile.numerics.reference.decode_attention`.

    Raises:
        ValueError: Query or mask do not fit the cache, or its buffers each other.
    """
    state = LayerState(*args[:NUM_BUFFERS])
    mask, sm_scale, capacity, spec, *rest = args[NUM_BUFFERS:]
    config = InnerQConfig.from_spec(spec)
    check_decode_attention(query, state, mask, sm_scale, capacity, config)
    if not serves(state):
        return ops.DEFAULTS["decode_attention"](query, *args)
    if query.numel() == 0:
        return torch.empty_like(query)
    query = rows_contiguous(query)
    batch, q_heads, q_len, head_dim = query.shape
    heads, num_blocks = state.k_codes.shape[1:3]
    num_rows = q_len * q_heads // heads
    exact = bool(rest and rest[0])
    row_tile = rows_per_program(num_rows, head_dim, exact)
    window_splits = -(-(config.sink + config.ring) // (BLOCK * BLOCKS_AT_ONCE))
    splits = num_splits(batch * heads * -(-num_rows // row_tile), num_blocks, _num_processors(query.device))
    all_splits = splits + window_splits

    kind, shared, strides = CAUSAL, False, (0, 0, 0, 0)
    if mask is not None:
        kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE
        mask = mask if kind == BOOLEAN else mask.float()
        strides = mask.expand(batch, q_heads, q_len, capacity).stride()
        if mask.is_contiguous() and mask.storage_offset() == 0:
            # The same tensor; but what as_strided reads Inductor computes once, not once more for every layer. Of a
            # mask with gaps it might make a dense copy, and then read that with the strides that are given here.
            mask = mask.as_strided(mask.shape, mask.stride())
        shared = (q_len == 1 or strides[2] == 0) and (q_heads == heads or strides[1] == 0)
    sums = query.new_empty((batch * heads, all_splits, num_rows, head_dim), dtype=torch.float32)
    stats = query.new_empty((batch * heads, all_splits, num_rows, 2), dtype=torch.float32)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)

    launch(
        decode_attention_kernel, (all_splits, batch * heads, -(-num_rows // row_tile)),
        query, *state, stats if mask is None else mask, sums, stats,
        *query.stride()[:3], *strides, heads, num_blocks, capacity, splits, sm_scale,
        Q_PER_KV=q_heads // heads, Q_LEN=q_len, HEAD_DIM=head_dim, GROUP=config.group_size,
        SINK=config.sink, RING=config.ring,
        **code_constants("K", config.key_spec), **code_constants("V", config.value_spec),
        MASK=kind, MASK_SHARED=shared, EXACT=exact, WIDEN=not _has_native_dot(query),
        ASM=_has_ptx(query.device), NB=BLOCKS_AT_ONCE, RT=row_tile, num_warps=BLOCKS_AT_ONCE,
    )  # fmt: skip
    launch(
        combine_kernel, (num_rows, batch * heads), sums, stats, state.counts, out,
        heads, num_blocks, splits, window_splits, num_rows,
        HEAD_DIM=head_dim, CHANNELS=triton.next_power_of_2(head_dim), NB=BLOCKS_AT_ONCE,
        SPLITS=combined_at_once(all_splits), num_warps=4,
    )  # fmt: skip
    return out


def rows_per_program(num_rows: int, head_dim: int, exact: bool) -> int:
    """Query rows of a program: as many as its registers hold; more rows take more programs, which share the L2."""
    return 8 if num_rows <= 8 or head_dim > 128 or exact else 16


def num_splits(num_programs: int, num_blocks: int, num_processors: int) -> int:
    """Splits of the packed blocks: as near as can be to what the device does at once, no part less than a program does.

    The nearest and not the next higher number: a few programs too many would wait for all the others to end.
    """
    places = -(-num_processors * PROGRAMS_PER_PROCESSOR * 15 // 16)  # the windows' programs want to begin too
    return max(1, min((2 * places + num_programs) // (2 * num_programs), -(-num_blocks // BLOCKS_AT_ONCE)))


def combined_at_once(all_splits: int | torch.SymInt) -> int:
    """One of :data:`COMBINED_AT_ONCE`; a number of splits that depends on a symbolic batch size may be any."""
    few, many = COMBINED_AT_ONCE
    return few if isinstance(all_splits, int) and all_splits <= few else many


@functools.lru_cache(maxsize=64)
def _num_processors(device: torch.device) -> int:
    """Multiprocessors; under Triton's interpreter two, so that there are several splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _has_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _has_native_dot(query: torch.Tensor) -> bool:
    """Whether windows may be multiplied in their own dtype; the interpreter multiplies bfloat16 wrongly."""
    return query.device.type == "cuda" and query.dtype != torch.float32
