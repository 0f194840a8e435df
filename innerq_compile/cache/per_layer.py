"""Settings of a model whose layers differ in more than their kind, as Gemma 4's: transformers names none for all."""

from __future__ import annotations

from typing import Any


def config_of_layer(text_config: Any, layer_idx: int) -> Any:
    """The configuration as layer ``layer_idx`` reads it."""
    return text_config.per_layer_config[layer_idx] if _differ(text_config) else text_config


def setting(text_config: Any, name: str) -> Any:
    """A setting, ``None`` where there is none; a list with an entry per layer where layers differ in it."""
    if not _differ(text_config):
        return getattr(text_config, name, None)
    values = [getattr(layer, name, None) for layer in text_config.per_layer_config]
    return values if any(value != values[0] for value in values) else values[0]


def _differ(text_config: Any) -> bool:
    return bool(getattr(text_config, "is_heterogeneous", False))
