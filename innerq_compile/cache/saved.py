"""From a file to an empty cache that its layers fit: whatever can be wrong about it is named, and the file with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from innerq_compile.cache.facts import facts_of, longest_cache
from innerq_compile.cache.room import check_tokens
from innerq_compile.cache.storage import SavedLayers, read_header, read_layers
from innerq_compile.numerics.config import InnerQConfig


def read_cache(
    make_cache: Callable[..., Any], path: str | os.PathLike[str], config: PreTrainedConfig, max_cache_len: int | None
) -> tuple[Any, SavedLayers]:
    """An empty cache with the settings of a file, and what the file holds, checked against both.

    Args:
        make_cache: Takes ``max_cache_len`` and settings by name.
        config: The model's configuration.
        max_cache_len: Another capacity than that of the saved cache.

    Raises:
        ValueError: What :meth:`InnerQCache.load <innerq_compile.InnerQCache.load>` says; nothing was allocated.
    """
    if max_cache_len is not None:
        check_tokens("max_cache_len", max_cache_len, "a positive integer or None")
    header = read_header(path)
    settings, model = header.get("settings"), header.get("model")
    if not isinstance(settings, dict) or not isinstance(model, dict):
        raise ValueError(f"{path} has a damaged header: settings and model must be objects")
    _check_model(path, facts_of(config), model)
    capacity = header.get("max_cache_len") if max_cache_len is None else max_cache_len
    longest = longest_cache(config)
    try:
        checked = InnerQConfig.from_options(settings)
        cache = make_cache(max_cache_len=capacity, **checked.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    if checked.sink + checked.ring > longest:
        raise ValueError(f"{path} has windows of {checked.sink + checked.ring} tokens, more than {longest}")
    saved = read_layers(path, header, cache.layers)
    longest = max(longest, 2 * saved.capacity)
    if max_cache_len is None and capacity is not None and capacity > longest:
        raise ValueError(
            f"{path} asks for a capacity of {capacity} tokens, more than {longest}, twice what the model or its "
            f"{saved.tokens} tokens need; load it with a max_cache_len of your own"
        )
    if capacity is not None and saved.capacity > capacity:
        needs = "" if saved.capacity == saved.tokens else f" (packed like these they need {saved.capacity})"
        raise ValueError(f"{path}: it holds {saved.tokens} tokens, more than the capacity of {capacity}{needs}")
    cache.grows_per_call = capacity is None or (max_cache_len is None and header.get("grows_per_call") is True)
    return cache, saved


def _check_model(path: str | os.PathLike[str], facts: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in sorted({*facts, *saved}):
        if facts.get(name) != saved.get(name):
            raise ValueError(
                f"{path} was saved for another model: its {name} is {saved.get(name)!r}, that of this "
                f"configuration {facts.get(name)!r}"
            )
