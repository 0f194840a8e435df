"""Attention over a ``StaticCache``: a packed copy of its 16-bit buffers is read in their place, and never served stale.

The buffers belong to transformers and stay the truth: whoever writes into them (an uncompiled step, ``reset()``, a beam
reorder, another graph) knows nothing of the copy. So the copy is found through the key buffer it belongs to and is used
only if nothing happened since the graph that made it was left: same storage, the version counters of both buffers where
they were, and the next token in the slot behind the last one. In every other case it is made again from the buffers.
Either way it holds bit for bit what :func:`quantize_buffers` makes of them.

Two things PyTorch does not count: writes through ``tensor.data`` or through memory that is shared with something else,
and writes into tensors made under ``torch.inference_mode()``. The latter are recognised and left alone.

Memory is not saved: the copy comes on top of the buffers. Pads are masked as the mask says, but take part in windows
and scales: nobody tells the copy which tokens they are.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from innerq_compile import ops
from innerq_compile.compat import pytorch
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import LayerState, allocate_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Shadow:
    """The packed copy of one layer.

    Attributes:
        state: Packs the first ``length`` tokens, with the settings ``spec``.
        values: The value buffer; the key buffer is the key that the copy is found by.
        seen: What the buffers looked like when the last graph was left.
        is_right: Whether the graph now running found them like that. ``False`` between graphs.
    """

    state: LayerState
    spec: str
    values: TensorWeakRef
    length: int
    seen: tuple[int, ...] = ()
    is_right: bool = False


_shadows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Key buffer -> its copy, which dies with it."""


def quantize_buffers(keys: torch.Tensor, values: torch.Tensor, length: int, config: InnerQConfig) -> LayerState:
    """A packed copy of the first ``length`` tokens of buffers [B, H, capacity, D].

    The first block is appended by itself, so that key norm and center depend on it alone and not on how many tokens
    the copy is made of: made at once or token by token, it is the same.
    """
    batch, heads, capacity, head_dim = keys.shape
    state = allocate_state(
        config,
        batch_size=batch,
        num_kv_heads=heads,
        head_dim=head_dim,
        capacity=capacity,
        dtype=keys.dtype,
        device=keys.device,
    )
    first = min(length, config.sink + config.ring)
    for part in (slice(0, first), slice(first, length)):
        if part.start < part.stop:
            ops.append_kv(keys[:, :, part], values[:, :, part], *state, capacity, config.spec)
    return state


def _shadow_attention(
    query: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    attn_mask: torch.Tensor,
    sm_scale: float,
    spec: str,
    exact: bool = False,
) -> torch.Tensor:
    """Writes key and value [B, H, M, D] at ``position`` [M] into the buffers, then attends to them with the query.

    A chunk that is longer than the fused op serves attends to the 16-bit buffers themselves.
    """
    key_buffer.index_copy_(2, position, key)
    value_buffer.index_copy_(2, position, value)
    begin, capacity = int(position[0]), key_buffer.shape[2]
    end, config = begin + len(position), InnerQConfig.from_spec(spec)
    can_be_watched = _can_be_watched(key_buffer, value_buffer) and torch.equal(position, torch.arange(begin, end))
    fits = key_buffer.shape == value_buffer.shape and attn_mask.shape[3] == capacity
    if not can_be_watched or not fits or len(position) > config.max_fused_q_len:
        if not can_be_watched:
            _tell_once_that_it_is_left_alone()
        _shadows.pop(key_buffer, None)  # it may hold tokens that have just been overwritten
        gqa = query.shape[1] != key_buffer.shape[1]
        return F.scaled_dot_product_attention(
            query, key_buffer, value_buffer, attn_mask, scale=sm_scale, enable_gqa=gqa
        )
    shadow = _shadows.get(key_buffer)
    if shadow is not None and shadow.is_right and (shadow.length, shadow.spec) == (begin, spec):
        ops.append_kv(key, value, *shadow.state, capacity, spec)
        shadow.length = end
    else:
        state = quantize_buffers(key_buffer, value_buffer, end, config)
        _shadows[key_buffer] = shadow = _Shadow(state, spec, TensorWeakRef(value_buffer), end)
    return ops.decode_attention(query, *shadow.state, attn_mask, sm_scale, capacity, spec, exact)


def watched(run: Callable[..., Any], buffers: Sequence[tuple[int, int]]) -> Callable[..., Any]:
    """A compiled graph that compares its buffers, when it is entered, with what they were when it was last left.

    Without this around it a graph makes its copies again at every call.

    Args:
        run: The graph.
        buffers: For every site the places of its key and its value buffer among the graph's inputs.
    """

    def call(*args: Any) -> Any:
        pairs = [(args[i], args[j]) for i, j in buffers if _can_be_watched(args[i], args[j])]
        for key_buffer, value_buffer in pairs:
            shadow = _shadows.get(key_buffer)
            if shadow is not None:
                is_same = shadow.values() is value_buffer and shadow.seen == _fingerprint(key_buffer, value_buffer)
                shadow.is_right = is_same
        result = run(*args)
        for key_buffer, value_buffer in pairs:
            shadow = _shadows.get(key_buffer)
            if shadow is not None:
                shadow.seen, shadow.is_right = _fingerprint(key_buffer, value_buffer), False
        return result

    return call


def _can_be_watched(key_buffer: torch.Tensor, value_buffer: torch.Tensor) -> bool:
    return not (key_buffer.is_inference() or value_buffer.is_inference())


def _fingerprint(key_buffer: torch.Tensor, value_buffer: torch.Tensor) -> tuple[int, ...]:
    """Changes with every write that PyTorch counts."""
    return (
        key_buffer.data_ptr(),
        value_buffer.data_ptr(),
        pytorch.version_of(key_buffer),
        pytorch.version_of(value_buffer),
    )


@functools.cache
def _tell_once_that_it_is_left_alone() -> None:
    logger.warning(
        "A StaticCache made under torch.inference_mode(), or written out of order, cannot be watched for changes: its "
        "attention reads the 16-bit buffers."
    )


_library = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
_library.define(
    "shadow_attention(Tensor query, Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor key, Tensor value, "
    "Tensor position, Tensor attn_mask, float sm_scale, str config, bool exact=False) -> Tensor"
)
_library.impl("shadow_attention", _shadow_attention, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{ops.NAMESPACE}::shadow_attention", lambda query, *args: query.new_empty(query.shape), lib=_library
)

shadow_attention = torch.ops.innerq.shadow_attention.default
"""``shadow_attention(query, key_buffer, value_buffer, key, value, position, attn_mask, sm_scale, config, exact)``
writes key and value at ``position`` into the buffers, then attends to what :func:`quantize_buffers` makes of them."""
