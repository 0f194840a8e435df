"""Shapes, dtypes and byte counts of every buffer of a cache layer: the one place to change a shape.

Axis letters: B batch rows, H key-value heads, D head_dim, N quantized tokens, g group_size, S sink,
R ring (recent + flush).

A *block* is 32 tokens. Its codes are cut into D / 32 *tiles* of 32 x 32 codes, ``[outer, inner]``, where the inner
axis is the contracted one (channels for keys, tokens for values) and the outer axis is the free one (tokens for keys,
channels for values). So keys and values look alike to a kernel: a scale belongs to one outer row and one inner group.

Bytes of a tile (``128 * bits``): one plane for 2, 4 and 8 bits; for 3 bits a plane of the two low bits (256 bytes)
followed by a plane of the high bit (128 bytes), so no code straddles a byte. In a plane of width w a byte holds 8 / w
fields, field f in bits ``w*f .. w*f+w-1``. With ``half = outer // 16``, ``quad = inner // 4``::

    Fo = min(8/w, 2)   Fi = (8/w) / Fo         # outer halves and inner parts that share a byte
    field = (quad // (8/Fi)) * Fo + (half if Fo == 2 else 0)
    byte  = (((quad % (8/Fi)) * (2/Fo) + (half if Fo == 1 else 0)) * 16 + outer % 16) * 4 + inner % 4

Every 64 bytes are 16 outer rows x 4 inner codes: after one shift and one AND they are the operand of an integer
dot-product instruction (4 products summed into each of 16 lanes), and the fields of one load never interleave.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from innerq_compile.numerics.config import BLOCK, InnerQConfig

SLOTS, QUANTIZED, PADS = 0, 1, 2
"""Columns of ``counts``: slots taken (pads included), tokens quantized, left pads that hold no token."""

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits per code -> widths of its bit planes, low bits first."""


class LayerState(NamedTuple):
    """The buffers of one layer, in the order in which the ops take them.

    A row's token t sits in slot t + pads. Tokens 0..S-1 are the sink, then come ``quantized`` packed tokens, the rest
    is the recent window. Both windows share a buffer: token t < S at index t, a later one at ``S + (t - S) % R``.
    """

    k_codes: torch.Tensor
    """uint8 [B, H, N/32, D/32, 128*key_bits]"""
    k_scales: torch.Tensor
    """float16 [B, H, N/32, D/g, 32]; a set sign bit marks an asymmetric group of a hybrid tensor"""
    k_zeros: torch.Tensor
    """float16, shape of k_scales; empty where the mode stores none"""
    k_window: torch.Tensor
    """model dtype [B, H, S+R, D]"""
    v_codes: torch.Tensor
    """uint8 [B, H, N/32, D/32, 128*value_bits]"""
    v_scales: torch.Tensor
    """float16 [B, H, N/g, D]"""
    v_zeros: torch.Tensor
    """float16, shape of v_scales; empty where the mode stores none"""
    v_window: torch.Tensor
    """model dtype [B, H, S+R, D]"""
    key_norm: torch.Tensor
    """float32 [B, H, D]; ones until the first block is quantized"""
    key_center: torch.Tensor
    """float32 [B, H, D]; zeros until the first block is quantized. Packed keys are ``(k - key_center) / key_norm``"""
    counts: torch.Tensor
    """int64 [B, 3]: SLOTS, QUANTIZED, PADS"""


def num_blocks(config: InnerQConfig, capacity: int) -> int:
    """Storage blocks that ``capacity`` tokens need; at least one flush, so that no buffer is ever empty."""
    return max(config.num_quantized(capacity), config.flush_tokens) // BLOCK


def allocate_state(
    config: InnerQConfig,
    *,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerState:
    """Empty buffers for ``capacity`` tokens. ``head_dim`` must be a multiple of 32 and of ``group_size``.

    Raises:
        ValueError: A head_dim that the layout cannot hold.
    """
    reason = unsupported_head_dim(config, head_dim)
    if reason:
        raise ValueError(reason)
    blocks = num_blocks(config, capacity)
    forms = buffer_forms(
        config, batch_size=batch_size, num_kv_heads=num_kv_heads, head_dim=head_dim, blocks=blocks, dtype=dtype
    )
    state = LayerState(**{name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in forms.items()})
    state.key_norm.fill_(1.0)
    return state


def buffer_forms(
    config: InnerQConfig, *, batch_size: int, num_kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every buffer of a :class:`LayerState` with ``blocks`` storage blocks, by name and in order."""
    g = config.group_size
    lead = (batch_size, num_kv_heads)
    k_groups = (*lead, blocks, head_dim // g, BLOCK)
    v_groups = (*lead, blocks * BLOCK // g, head_dim)
    window = (*lead, config.sink + config.ring, head_dim)
    return {
        "k_codes": ((*lead, blocks, head_dim // BLOCK, 128 * config.key_bits), torch.uint8),
        "k_scales": (k_groups, torch.float16),
        "k_zeros": (k_groups if config.key_spec.stores_zeros else (0,), torch.float16),
        "k_window": (window, dtype),
        "v_codes": ((*lead, blocks, head_dim // BLOCK, 128 * config.value_bits), torch.uint8),
        "v_scales": (v_groups, torch.float16),
        "v_zeros": (v_groups if config.value_spec.stores_zeros else (0,), torch.float16),
        "v_window": (window, dtype),
        "key_norm": ((*lead, head_dim), torch.float32),
        "key_center": ((*lead, head_dim), torch.float32),
        "counts": ((batch_size, 3), torch.int64),
    }


def unsupported_head_dim(config: InnerQConfig, head_dim: int) -> str | None:
    """Why keys and values of this ``head_dim`` cannot be packed, or ``None`` when they can."""
    unit = math.lcm(BLOCK, config.group_size)
    if head_dim % unit:
        return f"head_dim must be a multiple of {unit} (group_size {config.group_size}, 32 x 32 tiles), got {head_dim}"
    return None


def state_bytes(state: LayerState) -> int:
    """Bytes that the buffers of one layer really occupy."""
    return sum(t.untyped_storage().nbytes() for t in state)


def expected_bytes(config: InnerQConfig, *, num_kv_heads: int, head_dim: int, num_tokens: int, itemsize: int) -> float:
    """Bytes that one row of one layer should occupy by plain arithmetic: packed numbers plus windows."""
    window = min(num_tokens, config.sink + config.ring)
    packed = max(0, num_tokens - window)
    numbers = 2 * num_kv_heads * head_dim
    return numbers * (packed * config.bits_per_number / 8 + window * itemsize)
