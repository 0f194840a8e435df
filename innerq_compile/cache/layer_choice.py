"""Which layers a model's cache has, by what transformers itself would decode from, and which of them can be packed."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from innerq_compile.cache.rope import head_dim_of
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import unsupported_head_dim
from innerq_compile.refused import Refused, first_line


def layers_of_transformers(config: PreTrainedConfig, max_cache_len: int) -> StaticCache:
    """One layer for each of the model's: of the kind that transformers itself would decode from, at a fixed length.

    Raises:
        Refused: There are none, or the model would compute something else over them.
    """
    if "local" in (getattr(config.get_text_config(decoder=True), "attention_layers", None) or ()):
        # GPT-Neo's code, and the one fact about it that its configuration tells.
        raise Refused(
            config.model_type,
            "its local attention layers count their window from the end of the buffer, wherever the tokens end",
        )
    try:
        return StaticCache(config=config, max_cache_len=max_cache_len)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"transformers has no cache of fixed length for it ({first_line(error)})"
        raise Refused(config.model_type, reason) from error


def why_not_quantized(layer: CacheLayerMixin, text_config: Any, config: InnerQConfig) -> str | None:
    """Why a layer keeps transformers' own 16-bit buffers under these settings; ``None`` for one that is packed."""
    if type(layer) is not StaticLayer:
        return f"{type(layer).__name__} keeps its own 16-bit buffers"
    if getattr(text_config, "kv_lora_rank", None):
        return "latent attention: keys and values differ in shape"
    return unsupported_head_dim(config, head_dim_of(text_config))
