"""What a saved cache must have in common with the model that reads it."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedConfig

from innerq_compile.cache.mark import mark_of
from innerq_compile.cache.per_layer import setting
from innerq_compile.cache.room import MIN_CAPACITY


def facts_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What two models must have in common to read each other's caches, in JSON types; their weights aside."""
    text_config = config.get_text_config(decoder=True)
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    mark = mark_of(config)
    facts = {name: setting(text_config, name) for name in names}
    return {**facts, "folded key norm": None if mark is None else json.loads(json.dumps(dict(mark)))}


def longest_cache(config: PreTrainedConfig) -> int:
    """More tokens than any honest cache of this model has room for."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return 2 * max(positions if isinstance(positions, int) else 1 << 20, MIN_CAPACITY)
