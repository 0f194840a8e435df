"""How a cache learns which columns of a batch are padding, although transformers does not hand it the mask.

Before a model runs its layers, or ``generate()`` calls it, transformers asks the cache for the sizes of the mask and
then calls the mask function of the attention implementation with the user's 2-dimensional mask. :func:`watch_masks`
puts a function between that passes everything on unchanged and tells the cache that asked last what the mask was.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_asking = threading.local()
_MARK = "tells_innerq_caches"


class Learner(Protocol):
    """A cache that wants to see the mask."""

    def set_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Receives the mask [B, columns so far]; ``None`` where there is no padding."""


def watch_masks() -> None:
    """Registers the functions between, once per process, with transformers' registry of mask functions."""
    for name in ("sdpa", "eager"):
        inner = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(inner, _MARK):
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, _watching(inner))


def ask(cache: Learner, query_length: int) -> None:
    """Makes ``cache`` the one that the next mask of this thread belongs to, if it is for ``query_length`` queries."""
    # The mask may never come: whoever asked must not live on for it.
    _asking.cache, _asking.query_length = weakref.ref(cache), query_length


def leading_pads(attention_mask: torch.Tensor) -> torch.Tensor:
    """Columns in front of each row's first token: [B] of a mask [B, T] that is non-zero at tokens."""
    return ((attention_mask != 0).cumsum(1) == 0).sum(1)


def _watching(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def make_mask(*args: Any, **kwargs: Any) -> Any:
        reference, query_length = getattr(_asking, "cache", None), kwargs.get("q_length")
        cache = None if reference is None else reference()
        if cache is not None and _asking.query_length == query_length:
            cache.set_padding(kwargs.get("attention_mask"))
        _asking.cache = None
        return inner(*args, **kwargs)

    setattr(make_mask, _MARK, True)
    return make_mask
