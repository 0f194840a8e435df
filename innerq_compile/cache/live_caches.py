"""Every :class:`~innerq_compile.InnerQCache` that is alive, for whoever compiles a graph or changes a model's weights.

Keys belong to the weights that made them: once a key norm is folded into the weights, or taken out of them again, what
a cache holds of before fits no query any more. Such a cache refuses to be used, until :meth:`reset` empties it or its
weights are back. It does so without a check per step: its layers make room for ones that raise, which every guard of a
compiled graph notices.

A cache is known to belong to a model by the configuration it was made from, which must be the model's own and no copy.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

_live: weakref.WeakSet[Any] = weakref.WeakSet()

_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Text configuration -> a token for what the model's weights are now; none for weights as they were loaded."""


def register(cache: Any) -> None:
    """Counts a cache in for as long as it lives."""
    _live.add(cache)


def is_packed(layer: Any) -> bool:
    """Whether a layer is an :class:`~innerq_compile.cache.layer.InnerQLayer`, asked without importing transformers."""
    return bool(getattr(layer, "is_packed", False))


def keeps_in_16_bits(buffer: torch.Tensor) -> bool:
    """Whether a tensor holds the keys or values of a layer that an ``InnerQCache`` decided not to quantize."""
    return any(
        buffer is getattr(layer, "keys", None) or buffer is getattr(layer, "values", None)
        for cache in list(_live)
        for layer in getattr(cache, "layers", ())
        if not is_packed(layer)
    )


def filled_caches(num_kv_heads: int, head_dim: int) -> int:
    """How many caches hold quantizable keys of this shape."""

    def count() -> int:
        return sum(any(holds(layer) for layer in getattr(cache, "layers", ())) for cache in list(_live))

    def holds(layer: Any) -> bool:
        if not is_packed(layer) or layer.is_empty:
            return False
        return (layer.num_heads, layer.head_dim) == (num_kv_heads, head_dim)

    if count():
        gc.collect()  # those that only a cycle (an exception's traceback) keeps alive
    return count()


class OwnConfig:
    """A model's own text configuration: what a cache was made from, the same one for copies of that cache."""

    def __init__(self, config: Any) -> None:
        self.config = _text(config)

    def __deepcopy__(self, memo: Any) -> OwnConfig:
        return self


_numbers = itertools.count(1)


def new_weights() -> int:
    """A token for weights that no cache was filled with yet."""
    return next(_numbers)


def weights_of(config: Any) -> int:
    """A token for what a model's weights are now, for :func:`weights_changed` when they are that again."""
    return int(_weights.get(_text(config), 0))


def weights_changed(config: Any, what: str, now: int) -> None:
    """Tells the caches of a model that its keys are scaled differently from now on.

    Args:
        config: The model's configuration.
        what: What was called, for the user to read.
        now: A token for the weights that are in the model now.
    """
    from innerq_compile.cache.refusing import RefusingLayer  # here: the backend imports this file without transformers

    before = weights_of(config)
    if now == before:
        return
    _weights[_text(config)] = now
    for cache in list(_live):
        if cache.model_config.config is _text(config):
            if cache.set_aside is None and _holds_tokens(cache):
                cache.set_aside = (before, cache.layers)
                cache.layers = [RefusingLayer(what) for _ in cache.layers]
            elif cache.set_aside is not None and cache.set_aside[0] == now:
                take_back(cache)


def take_back(cache: Any) -> None:
    """Gives a cache that was refusing its layers back."""
    _, cache.layers = cache.set_aside
    cache.set_aside = None


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _holds_tokens(cache: Any) -> bool:
    for layer in cache.layers:
        if is_packed(layer):
            if not layer.is_empty:
                return True
        elif getattr(layer, "keys", None) is not None and int(layer.get_seq_length()) > 0:
            return True
    return False
