"""Caches made of random codes: what a decode step reads costs the same whatever the codes say.

A real prefill of a long context would take longer than everything that is measured on it. All bit patterns are valid
codes of the ``full`` levels, and random ones are as hard on the memory and the datapath as real ones.
"""

from __future__ import annotations

import torch

from innerq_compile.numerics.config import BLOCK, InnerQConfig
from innerq_compile.numerics.layout import QUANTIZED, SLOTS, LayerState, allocate_state

SPARE = 64
"""Free slots behind the context, for the tokens that a measurement appends."""

ASYMMETRIC_SHARE = 0.01
"""Groups of a hybrid tensor that say they are asymmetric; the paper's timing assumes 1 %."""


def empty_state(
    config: InnerQConfig, batch: int, heads: int, head_dim: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> LayerState:
    """Buffers that hold nothing."""
    shape = {"batch_size": batch, "num_kv_heads": heads, "head_dim": head_dim, "capacity": capacity}
    return allocate_state(config, **shape, dtype=dtype, device=device)


def random_state(
    config: InnerQConfig, batch: int, heads: int, head_dim: int, context: int, device: torch.device, dtype: torch.dtype
) -> LayerState:
    """Buffers that hold ``context`` tokens, with SPARE free slots."""
    state = empty_state(config, batch, heads, head_dim, context + SPARE, device, dtype)
    fill(state, config, context)
    return state


def fill(state: LayerState, config: InnerQConfig, context: int) -> None:
    """Random numbers of a plausible size everywhere, and counts that say ``context`` tokens are held."""
    for name, buffer in state._asdict().items():
        if name.endswith("_codes"):
            buffer.random_(0, 256)
        elif name.endswith("_scales"):
            spec = config.key_spec if name[0] == "k" else config.value_spec
            buffer.uniform_(0.35 / spec.symmetric_center, 2.1 / spec.symmetric_center)
            if spec.mode == "hybrid":
                chosen = torch.rand(buffer.shape, device=buffer.device, dtype=torch.float32) < ASYMMETRIC_SHARE
                buffer.copy_(torch.where(chosen, -buffer, buffer))
        elif name.endswith(("_zeros", "_window")):
            buffer.normal_()
        elif name == "key_norm" and config.key_norm != "off":
            buffer.uniform_(0.7, 1.4)
        elif name == "key_center" and config.key_center != "off":
            buffer.normal_(0.0, 0.3)
    modes = ((config.key_mode, state.k_scales, state.k_zeros), (config.value_mode, state.v_scales, state.v_zeros))
    for mode, scales, zeros in modes:
        if mode == "hybrid":
            zeros.masked_fill_(~torch.signbit(scales), 0.0)
    set_context(state, config, context)


def set_context(state: LayerState, config: InnerQConfig, context: int) -> None:
    """Makes the buffers hold ``context`` tokens of those that they were filled with."""
    state.counts.zero_()
    state.counts[:, SLOTS] = context
    state.counts[:, QUANTIZED] = config.num_quantized(context)


def held_bytes(state: LayerState, config: InnerQConfig, context: int) -> int:
    """Bytes of a decode step's packed part and windows: what has to be read, spare capacity left out."""
    quantized, total = config.num_quantized(context), 0
    for name, buffer in state._asdict().items():
        if buffer.dim() < 3 or not buffer.numel():
            continue
        units = buffer.shape[2]
        if name.endswith("_window"):
            held = min(context - quantized, units)
        elif name.startswith("v_") and not name.endswith("_codes"):
            held = quantized // config.group_size
        else:
            held = quantized // BLOCK if name.startswith(("k_", "v_")) else units
        total += buffer.numel() * buffer.element_size() * held // units
    return total
