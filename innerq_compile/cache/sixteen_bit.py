"""Layers of transformers' own that stay in 16 bit: sized and enlarged like ours, and never written past their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from innerq_compile.cache.held_tensors import may_be_changed_anywhere, tensors_of
from innerq_compile.cache.room import check_room
from innerq_compile.compat import pytorch
from innerq_compile.ops import overflow_error

UNBOUNDED = 1 << 62
"""A capacity that no buffer is ever allocated with: at it, a sliding layer shows its window."""


def is_resizable(layer: CacheLayerMixin) -> bool:
    """Whether keys and values are all that the capacity of this 16-bit layer sizes."""
    known = (StaticLayer.update, StaticSlidingWindowLayer.update)
    return isinstance(layer, StaticLayer) and type(layer).update in known and not hasattr(layer, "update_indexer")


def is_all_keys_and_values(layer: object) -> bool:
    """Whether a 16-bit layer holds nothing beside keys and values, as layers that are also recurrent do."""
    return type(layer) in (StaticLayer, StaticSlidingWindowLayer)


def is_allocated(layer: StaticLayer) -> bool:
    """Whether the layer has its buffers."""
    return layer.keys is not None


def tokens_held(layer: StaticLayer) -> int:
    """Tokens that the layer was given; reads the device unless it is a sliding layer."""
    return int(getattr(layer, "cumulative_length_int", layer.cumulative_length)) if is_allocated(layer) else 0


def resize(layer: StaticLayer, capacity: int, window: int | None) -> None:
    """Makes room for ``capacity`` tokens, or for a window if that is smaller; what is stored stays bit for bit.

    An empty layer without buffers takes the size, larger or smaller; others never shrink.
    """
    size = capacity if window is None else min(capacity, window)
    if is_allocated(layer) and size > layer.max_cache_len:
        for name in ("keys", "values"):
            old = getattr(layer, name)
            with may_be_changed_anywhere():
                new = old.new_zeros((*old.shape[:2], size, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(layer, name, new)
            pytorch.mark_static_address(new)
        if window is not None:  # transformers stops counting in the tensor when the layer gets full
            layer.cumulative_length.fill_(layer.cumulative_length_int)
    if not is_allocated(layer) or size > layer.max_cache_len:
        layer.max_cache_len = size


def check_fits(layer: StaticLayer, num_new: int, window: int | None, device: torch.device) -> None:
    """Refuses tokens that the layer has no room for. A layer that holds its whole window forgets and takes any number.

    Raises:
        RuntimeError: Names length and capacity; nothing was changed.
    """
    if window is None:
        if device.type == "cpu":
            check_room(layer.cumulative_length, num_new, layer.max_cache_len)
    elif layer.max_cache_len < window and layer.cumulative_length_int + num_new > layer.max_cache_len:
        raise overflow_error(layer.cumulative_length_int, num_new, layer.max_cache_len)


def select_rows(layer: StaticLayer, indices: torch.Tensor) -> None:
    """Keeps the rows at ``indices``, in that order; the batch size may change."""
    if is_allocated(layer):
        for name in ("keys", "values"):
            with may_be_changed_anywhere():
                setattr(layer, name, getattr(layer, name)[indices.to(layer.device)])
            pytorch.mark_static_address(getattr(layer, name))
        layer.batch_size = layer.keys.shape[0]


def layers_with_rows(layers: Sequence[CacheLayerMixin]) -> list[tuple[int, Any]]:
    """The layers whose rows can be changed, with their indices, once it is sure that no other one holds any.

    Raises:
        NotImplementedError: One does, and has no way to change them.
    """
    able = []
    for index, layer in enumerate(layers):
        if hasattr(layer, "batch_select_indices") or is_all_keys_and_values(layer):
            able.append((index, layer))
        elif any(tensor.dim() for tensor in tensors_of(layer)):  # a length alone, of no axis, is nothing yet
            raise NotImplementedError(f"a {type(layer).__name__} of transformers cannot change its rows")
    return able
