"""How much cache fits beside a model: by the buffers' bytes, and tried at the largest batch of one context."""

from __future__ import annotations

import torch

from gpu.caches import SPARE, empty_state, random_state
from gpu.models import SHAPES, config_of, on_meta
from gpu.section import Section
from innerq_compile import ops
from innerq_compile.numerics.config import InnerQConfig

CACHES = ("static", "int8", "int4", "base", "small")
CONTEXTS = (8192, 32768, 131072)
USABLE = 0.92
"""Share of the GPU's memory that weights and cache may take; the rest is left to activations and the allocator."""


def run(section: Section) -> None:
    """Rows ``fits`` (computed) and one row ``tried`` (allocated and attended, layer by layer)."""
    total = 2**34 if section.dry else torch.cuda.get_device_properties(0).total_memory
    for name in ("tiny",) if section.dry else ("8b", "1b"):
        weights = weight_bytes(name)
        for context in CONTEXTS:
            for cache in CACHES:
                one = cache_bytes(name, cache, context)
                row = {"batch": int((USABLE * total - weights) // one), "bytes_per_row": one, "weight_bytes": weights}
                section.emit("fits", model=name, cache=cache, context=context, **row)
    with section.attempt(way="tried"):
        _try(section, total)


def weight_bytes(name: str) -> int:
    """Bytes of the weights in 16 bit."""
    return sum(parameter.numel() * 2 for parameter in on_meta(name, torch.bfloat16).parameters())


def cache_bytes(name: str, cache: str, context: int) -> int:
    """Bytes of one row's cache in a bf16 model, by its buffers' shapes."""
    shape, capacity = SHAPES[name], context + SPARE
    heads, head_dim, layers = (shape[key] for key in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    if cache == "static":
        return 4 * heads * head_dim * capacity * layers
    config, meta = InnerQConfig.from_preset(cache), torch.device("meta")
    state = empty_state(config, 1, heads, head_dim, capacity, meta, torch.bfloat16)
    return layers * sum(x.numel() * x.element_size() for x in state)


def _try(section: Section, total: int) -> None:
    """Fills the memory with weights and caches, and decodes one token in every layer."""
    name, preset, context = ("tiny", "base", 200) if section.dry else ("8b", "base", 32768)
    model, config, weights = config_of(name), InnerQConfig.from_preset(preset), weight_bytes(name)
    usable = min(USABLE * total, section.free_bytes() - 2e9)
    batch = 2 if section.dry else int((usable - weights) // cache_bytes(name, preset, context))
    held = torch.empty(weights, dtype=torch.uint8, device=section.device)
    shape = (batch, model.num_key_value_heads, model.head_dim, context)
    states = [random_state(config, *shape, section.device, section.dtype) for _ in range(model.num_hidden_layers)]
    query = torch.randn(batch, model.num_attention_heads, 1, model.head_dim, device=section.device, dtype=section.dtype)
    for state in states:
        query = ops.decode_attention(query, *state, None, model.head_dim**-0.5, context + SPARE, config.spec)
    peak = 0 if section.dry else torch.cuda.max_memory_allocated()
    row = {"model": name, "cache": preset, "context": context, "batch": batch, "weight_bytes": held.numel()}
    section.emit("tried", **row, finite=bool(torch.isfinite(query).all()), peak_bytes=peak)
