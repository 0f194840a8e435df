"""What a cache has in place of its layers while its keys belong to other weights than the model's."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class RefusingLayer(CacheLayerMixin):
    """Stands for a layer whose keys belong to other weights than the model's: whatever it is asked for, it says so."""

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        _refuse(self.what)

    lazy_initialization = update = get_mask_sizes = get_seq_length = get_max_length = get_max_cache_shape = _refuse
    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse


@torch.compiler.assume_constant_result  # raises while a step is traced, so that nothing half-traced is kept of it
def _refuse(what: str) -> None:
    raise RuntimeError(
        f"this InnerQCache was filled before {what} changed the model's weights: its keys fit the old ones. Call "
        "reset() on it, or use a new cache, and run the prompt again; a fold that is undone gives it back"
    )
