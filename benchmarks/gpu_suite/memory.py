"""How much cache fits beside a model: by the buffers' bytes, and tried at the largest batch of one context."""

from __future__ import annotations

import gc

import torch

from gpu_suite import models
from gpu_suite.context import Context
from gpu_suite.end_to_end import Unit, cache_bytes
from gpu_suite.states import random_state
from innerq_compile import ops
from innerq_compile.config import InnerQConfig

CACHES = ("static", "int8", "int4", "base", "small")
CONTEXTS = (8192, 32768, 131072)
USABLE = 0.92
"""Share of the GPU's memory that weights and cache may take; the rest is left to activations and the allocator."""
TRIED = ("8b", "base", 32768)


def run(context: Context) -> None:
    """Rows ``fits`` (computed) and one row ``tried`` (allocated and attended, layer by layer)."""
    total = 2**34 if context.dry else torch.cuda.get_device_properties(context.device).total_memory
    for name in ("tiny",) if context.dry else ("8b", "1b"):
        config, weights = models.config_of(name), models.weight_bytes(name)
        for length in CONTEXTS:
            for cache in CACHES:
                one = cache_bytes(Unit(name, cache, 1, (length,)), config)
                batch = int((USABLE * total - weights) // one)
                context.emit(
                    "fits", model=name, cache=cache, context=length, batch=batch, bytes_per_row=one,
                    weight_bytes=weights, usable_bytes=int(USABLE * total),
                )  # fmt: skip
    try:
        _try(context, total)
    except torch.cuda.OutOfMemoryError as error:
        context.emit("failed", way="tried", reason=str(error)[:500])


def _try(context: Context, total: int) -> None:
    """Fills the memory with weights and caches of :data:`TRIED`, and decodes one token in every layer."""
    name, preset, length = ("tiny", "base", 200) if context.dry else TRIED
    model, config = models.config_of(name), InnerQConfig.from_preset(preset)
    weights = models.weight_bytes(name)
    one = cache_bytes(Unit(name, preset, 1, (length,)), model)
    # Other processes of the suite, waiting for their turn, hold a few gigabytes.
    free = total if context.dry else torch.cuda.mem_get_info()[0]
    batch = 2 if context.dry else max(1, int((min(USABLE * total, 0.97 * free - 2e9) - weights) // one))
    dtype = torch.float32 if context.dry else torch.bfloat16
    held = torch.empty(weights, dtype=torch.uint8, device=context.device)
    states = [
        random_state(
            config, batch=batch, heads=model.num_key_value_heads, head_dim=model.head_dim, context=length,
            device=context.device, dtype=dtype,
        )
        for _ in range(model.num_hidden_layers)
    ]  # fmt: skip
    query = torch.randn(batch, model.num_attention_heads, 1, model.head_dim, device=context.device, dtype=dtype)
    for state in states:
        query = ops.decode_attention(query, *state, None, model.head_dim**-0.5, length + 64, config.spec)
    peak = 0 if context.dry else torch.cuda.max_memory_allocated()
    finite = bool(torch.isfinite(query).all())
    context.emit(
        "tried", model=name, cache=preset, context=length, batch=batch, finite=finite, peak_bytes=peak,
        weight_bytes=held.numel(),
    )  # fmt: skip
    del states, held
    gc.collect()
