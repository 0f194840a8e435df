"""What can be said about a model from its code, without running it: whether it could decode from a quantized cache."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from innerq_compile.cache.per_layer import setting
from innerq_compile.compat.hf_transformers import CACHE_HOOK, offers_usual_cache
from innerq_compile.refused import Refused

_SLIDING_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")


def decoder_of(model: Any) -> PreTrainedModel:
    """The transformers model that decodes: the one inside a PEFT model, whose adapters are layers like others.

    Raises:
        TypeError: Not a decoder-only transformers model that can ``generate()``.
        Refused: A PEFT model that puts keys and values of its own in front of the prompt.
    """
    inner = model
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if any(settings.is_prompt_learning for settings in model.peft_config.values()):
            raise Refused(type(model).__name__, "fills its cache with learned keys and values (prompt learning)")
        inner = model.get_base_model()
    name = type(model).__name__
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        hint = "; pass the model that torch.compile() was given" if hasattr(model, "_orig_mod") else ""
        raise TypeError(f"enable() needs a transformers model that can generate(), got {name}{hint}")
    if inner.config.is_encoder_decoder or not hasattr(inner, CACHE_HOOK):
        raise TypeError(f"enable() needs a decoder-only model, got {name}")
    return inner


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuses a model whose code has no place for a cache of keys and values.

    Raises:
        Refused: Saying what it has instead.
    """
    name = type(model).__name__
    taken = inspect.signature(model.forward).parameters
    if "past_key_values" not in taken:
        own = next((p for p in ("cache_params", "mems", "past_buckets_states", "state", "cache") if p in taken), None)
        instead = f"it remembers the past in {own}" if own else "it remembers nothing from step to step"
        raise Refused(name, f"its forward takes no past_key_values, {instead}")
    if not offers_usual_cache(model):
        raise Refused(name, "it makes a cache of its own kind, and transformers offers it no other")
    window = setting(model.config.get_text_config(decoder=True), "sliding_window")
    if window and _cache_slides(model) and not _mask_slides(model):
        raise Refused(
            name,
            f"its cache forgets what is {window} tokens old, by its configuration, but its code builds no such mask: "
            "over any two kinds of cache it computes different things from there on",
        )


def _cache_slides(model: PreTrainedModel) -> bool:
    return any(DynamicCache(config=model.config.get_text_config(decoder=True)).is_sliding)


def _mask_slides(model: PreTrainedModel) -> bool:
    """Whether the code of the model, or of a model inside it, knows a mask that hides what a cache may forget."""
    codes = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    return any(hasattr(sys.modules[code], mask) for code in codes for mask in _SLIDING_MASKS)
